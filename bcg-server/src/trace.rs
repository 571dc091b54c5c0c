//! One OpenTelemetry span for each request, sent to a collector with OTLP over HTTP.
//!
//! Names of attributes follow the semantic conventions for HTTP and for generative AI. A `traceparent` of the client is
//! the span's parent. Without the option `otlp_endpoint` nothing here runs.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::uri::InvalidUri;
use axum::http::{Response, Uri};
use bcg_engine::{EngineEvent, EventStream};
use http_body_util::{BodyExt, Full, Limited};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanKind, Status, Tracer as _, TracerProvider};
use opentelemetry::{KeyValue, Value};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::HttpError;
use crate::error::{BoxError, with_causes};
use crate::http_client::HttpClient;

/// How long the collector may take.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of its answer.
const EXPORT_ANSWER_MAX: usize = 64 << 10;
/// Events on their way from the engine to a traced request.
const EVENTS: usize = 16;

tokio::task_local! {
    /// The span of the request that a task works on.
    static CURRENT: Option<RequestSpan>;
}

/// Runs a request's future so that [`watched`] finds its span.
pub(crate) fn scope<F: Future>(span: Option<RequestSpan>, future: F) -> impl Future<Output = F::Output> {
    CURRENT.scope(span, future)
}

/// Lets the span of the current request, if there is one, see the events of an answer.
pub(crate) fn watched(mut events: EventStream) -> EventStream {
    let Some(span) = CURRENT.try_with(Clone::clone).ok().flatten() else { return events };
    let (sender, receiver) = mpsc::channel(EVENTS);
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = sender.closed() => None,
            };
            let Some(event) = event else { return };
            span.see(&event);
            if sender.send(event).await.is_err() {
                return;
            }
        }
    });
    EventStream::new(receiver)
}

/// Checks that spans can be sent to a collector.
///
/// # Errors
/// If the URL is none.
pub(crate) fn check(endpoint: &str) -> Result<(), HttpError> {
    collector(endpoint).map(drop)
}

fn collector(endpoint: &str) -> Result<(Uri, HttpClient), HttpError> {
    let url: Uri = endpoint.parse().map_err(|error: InvalidUri| refused(endpoint, error.into()))?;
    let client = HttpClient::new(&url).map_err(|error| refused(endpoint, error))?;
    Ok((url, client))
}

fn refused(endpoint: &str, error: BoxError) -> HttpError {
    HttpError::value("otlp_endpoint", endpoint.to_string(), error)
}

/// Makes spans and sends them.
#[derive(Clone)]
pub(crate) struct Tracer {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").finish_non_exhaustive()
    }
}

impl Tracer {
    /// Starts sending to a collector; `/v1/traces` is added to a URL without a path. The current tokio runtime sends.
    ///
    /// # Errors
    /// If the URL is none.
    pub(crate) fn new(endpoint: &str) -> Result<Self, HttpError> {
        let (url, client) = collector(endpoint)?;
        let url = match url.path() {
            "" | "/" => format!("{}/v1/traces", endpoint.trim_end_matches('/')),
            _ => endpoint.to_owned(),
        };
        let runtime = Handle::try_current().map_err(|error| refused(endpoint, error.into()))?;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Sender { client, runtime, failing: AtomicBool::new(false) })
            .with_endpoint(url);
        let exporter = exporter.build().map_err(|error| refused(endpoint, error.into()))?;
        // The builder reads OTEL_RESOURCE_ATTRIBUTES itself; the name has a default of its own.
        let name = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "bcg-server".to_owned());
        let resource = Resource::builder().with_service_name(name).build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { tracer: provider.tracer("bcg-server"), provider })
    }

    /// Begins the span of a request.
    pub(crate) fn begin(&self, request: &Request, route: &str, model: &str) -> RequestSpan {
        let parent = TraceContextPropagator::new().extract(&HeaderExtractor(request.headers()));
        let (method, path) = (request.method().as_str().to_owned(), request.uri().path().to_owned());
        let span = self.tracer.span_builder(format!("{method} {route}")).with_kind(SpanKind::Server).with_attributes([
            KeyValue::new("http.request.method", method),
            KeyValue::new("http.route", route.to_owned()),
            KeyValue::new("url.path", path),
        ]);
        let operation = if route.contains("chat") { "chat" } else { "text_completion" };
        RequestSpan(Arc::new(Mutex::new(Open {
            span: span.start_with_context(&self.tracer, &parent),
            began: Instant::now(),
            operation,
            model: model.to_owned(),
            first_token: None,
            input_tokens: 0,
            output_tokens: 0,
            failure: None,
        })))
    }

    /// Sends what is left.
    pub(crate) async fn shutdown(self) {
        // It waits for the thread that sends, which needs this runtime.
        let ended = tokio::task::spawn_blocking(move || self.provider.shutdown()).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::warn!("the last spans were not sent to the OpenTelemetry collector");
        }
    }
}

/// The span of a request, while it is open.
#[derive(Clone)]
pub(crate) struct RequestSpan(Arc<Mutex<Open>>);

struct Open {
    span: opentelemetry_sdk::trace::Span,
    began: Instant,
    operation: &'static str,
    model: String,
    first_token: Option<Duration>,
    input_tokens: usize,
    output_tokens: usize,
    failure: Option<String>,
}

impl RequestSpan {
    /// Notes what an event says. One request may have several answers.
    fn see(&self, event: &EngineEvent) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            EngineEvent::Delta(_) => {
                let since = open.began.elapsed();
                open.first_token.get_or_insert(since);
            }
            EngineEvent::Finished { usage, .. } => {
                open.input_tokens = usage.prompt_tokens;
                open.output_tokens += usage.completion_tokens;
            }
            EngineEvent::Failed(error) => open.failure = Some(error.to_string()),
        }
    }

    /// Ends the span; `status` is that of the answer, if there was one.
    pub(crate) fn end(&self, status: Option<u16>, is_whole: bool) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Open { operation, first_token, input_tokens, output_tokens, .. } = *open;
        let model = open.model.clone();
        let mut set = |name: &'static str, value: Value| open.span.set_attribute(KeyValue::new(name, value));
        if let Some(status) = status {
            set("http.response.status_code", i64::from(status).into());
        }
        if let Some(first_token) = first_token {
            set("gen_ai.operation.name", operation.into());
            set("gen_ai.provider.name", "bcg".into());
            set("gen_ai.request.model", model.clone().into());
            set("gen_ai.response.model", model.into());
            set("gen_ai.server.time_to_first_token", first_token.as_secs_f64().into());
        }
        if output_tokens > 0 {
            set("gen_ai.usage.input_tokens", (input_tokens as i64).into());
            set("gen_ai.usage.output_tokens", (output_tokens as i64).into());
        }
        let failure = match (open.failure.take(), status, is_whole) {
            (Some(failure), ..) => Some(("engine_error".to_owned(), failure)),
            (None, Some(status), _) if status >= 500 => Some((status.to_string(), String::new())),
            (None, _, false) => Some(("client_left".to_owned(), String::new())),
            _ => None,
        };
        if let Some((kind, description)) = failure {
            open.span.set_attribute(KeyValue::new("error.type", kind));
            open.span.set_status(Status::error(description));
        }
        open.span.end();
    }
}

/// Sends from the exporter's own thread, through the server's runtime.
#[derive(Debug)]
struct Sender {
    client: HttpClient,
    runtime: Handle,
    /// Whether the latest try failed.
    failing: AtomicBool,
}

#[async_trait]
impl opentelemetry_http::HttpClient for Sender {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, BoxError> {
        let client = self.client.clone();
        let sent = self.runtime.spawn(async move {
            let exchange = async {
                let (head, body) = client.send(request.map(Full::new)).await?.into_parts();
                let body = Limited::new(body, EXPORT_ANSWER_MAX).collect().await?.to_bytes();
                Ok::<_, BoxError>(Response::from_parts(head, body))
            };
            timeout(EXPORT_TIMEOUT, exchange).await?
        });
        let answer = sent.await.map_err(BoxError::from).flatten();
        let failure = match &answer {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("HTTP {}", answer.status().as_u16())),
            Err(error) => Some(with_causes(error.as_ref())),
        };
        // Said once, not at each try.
        let was_failing = self.failing.swap(failure.is_some(), Ordering::Relaxed);
        match failure {
            Some(error) if !was_failing => tracing::warn!(error, "spans cannot be sent to the OpenTelemetry collector"),
            None if was_failing => tracing::info!("spans are sent to the OpenTelemetry collector again"),
            _ => {}
        }
        answer
    }
}
