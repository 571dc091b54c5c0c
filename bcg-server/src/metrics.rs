//! `GET /metrics`: the engine's metrics, and those of HTTP before them.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::App;

/// What a scraper names that reads OpenMetrics text.
const OPENMETRICS: &str = "application/openmetrics-text";
/// The content type of OpenMetrics text.
const OPENMETRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The content type of Prometheus's text, which everything else reads: SGLang's gateway, for one.
const PROMETHEUS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels of an HTTP request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpLabels {
    /// The route, not the path: a client cannot make new values.
    route: String,
    /// The status code.
    code: u16,
}

/// What is counted of HTTP. Clones count together.
#[derive(Clone)]
pub(crate) struct HttpMetrics {
    registry: Arc<Registry>,
    requests: Family<HttpLabels, Counter>,
}

impl Default for HttpMetrics {
    fn default() -> Self {
        let (mut registry, requests) = (Registry::with_prefix("bcg"), Family::default());
        registry.register("http_requests", "HTTP requests by route and status", requests.clone());
        Self { registry: Arc::new(registry), requests }
    }
}

impl HttpMetrics {
    /// Counts an answer.
    pub(crate) fn count(&self, route: &str, code: u16) {
        self.requests.get_or_create(&HttpLabels { route: route.to_owned(), code }).inc();
    }

    /// Returns OpenMetrics text: these metrics, then those of the engine's replicas.
    fn render(&self, replicas: &[&bcg_engine::Metrics]) -> String {
        let mut text = String::new();
        let encoded = encode_registry(&mut text, &self.registry)
            .and_then(|()| bcg_engine::Metrics::encode_all(replicas, &mut text));
        // Writing to a string cannot fail; half an exposition would be worse than none.
        if encoded.and_then(|()| encode_eof(&mut text)).is_err() {
            text.clear();
        }
        text
    }
}

/// All metrics, as OpenMetrics text for who asks for it, else as Prometheus's.
pub(crate) async fn metrics(State(app): State<App>, headers: HeaderMap) -> Response {
    let text = app.metrics.render(&app.engine.replica_metrics());
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let (content_type, text) = if accepted.into_iter().any(|value| value.contains(OPENMETRICS)) {
        (OPENMETRICS_TYPE, text)
    } else {
        (PROMETHEUS_TYPE, prometheus(&text))
    };
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

/// Turns OpenMetrics text into Prometheus's: there a counter's family has the name of its samples, and there are neither
/// units nor a mark of the end.
fn prometheus(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut lines = openmetrics.lines().peekable();
    while let Some(line) = lines.next() {
        if line.starts_with("# UNIT ") || line == "# EOF" {
            continue;
        }
        let is_counter = |line: &str| line.starts_with("# TYPE ") && line.ends_with(" counter");
        let of_counter = is_counter(line) || lines.peek().is_some_and(|next| is_counter(next));
        let comment = line.strip_prefix("# ").filter(|_| of_counter);
        let parts =
            comment.and_then(|comment| comment.split_once(' ')).map(|(word, rest)| (word, rest.split_once(' ')));
        match parts {
            Some((word, Some((name, rest)))) => text.extend(["# ", word, " ", name, "_total ", rest]),
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_one_openmetrics_text() {
        let (metrics, engine) = (HttpMetrics::default(), bcg_engine::Metrics::default());
        metrics.count("/health", 200);
        engine.time_to_first_token.observe(0.01);
        let text = metrics.render(&[&engine]);
        assert!(text.contains("bcg_http_requests_total{route=\"/health\",code=\"200\"} 1"), "{text}");
        assert!(text.contains("bcg_time_to_first_token_seconds_count 1"), "{text}");
        assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1, "{text}");
    }

    #[test]
    fn in_prometheus_text_a_counters_family_has_the_name_of_its_samples() {
        let metrics = HttpMetrics::default();
        metrics.count("/health", 200);
        let engine = bcg_engine::Metrics::default();
        engine.queue_depth.set(3);
        let text = prometheus(&metrics.render(&[&engine]));
        let requests = "# HELP bcg_http_requests_total HTTP requests by route and status.\n\
                        # TYPE bcg_http_requests_total counter\n\
                        bcg_http_requests_total{route=\"/health\",code=\"200\"} 1\n\
                        # HELP bcg_queue_depth Submissions that wait.\n\
                        # TYPE bcg_queue_depth gauge\nbcg_queue_depth 3\n";
        assert!(text.starts_with(requests), "{text}");
        assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
        let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"));
        assert!(families.clone().count() > 5 && families.clone().all(|name| name.ends_with("_total")), "{text}");
    }
}
