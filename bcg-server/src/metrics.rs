//! `GET /metrics`: the engine's metrics, and those of HTTP before them.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::App;

/// The content type of OpenMetrics text.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

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

    /// Returns OpenMetrics text: these metrics, then those of the engine.
    fn render(&self, engine: &bcg_engine::Metrics) -> String {
        let mut text = String::new();
        let encoded = encode_registry(&mut text, &self.registry).and_then(|()| engine.encode(&mut text));
        // Writing to a string cannot fail; half an exposition would be worse than none.
        if encoded.and_then(|()| encode_eof(&mut text)).is_err() {
            text.clear();
        }
        text
    }
}

/// All metrics as OpenMetrics text, which Prometheus reads.
pub(crate) async fn metrics(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], app.metrics.render(app.engine.metrics())).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_one_openmetrics_text() {
        let (metrics, engine) = (HttpMetrics::default(), bcg_engine::Metrics::default());
        metrics.count("/health", 200);
        engine.time_to_first_token.observe(0.01);
        let text = metrics.render(&engine);
        assert!(text.contains("bcg_http_requests_total{route=\"/health\",code=\"200\"} 1"), "{text}");
        assert!(text.contains("bcg_time_to_first_token_seconds_count 1"), "{text}");
        assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1, "{text}");
    }
}
