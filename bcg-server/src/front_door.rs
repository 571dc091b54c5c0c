//! What every request passes on its way to a route, and every answer on its way back.
//!
//! From the outside in: a request id, the log line, the count and the span of the request ([`observe`]); CORS; the API
//! key and the whole body, in time and within its limit ([`admit`]). So a route only ever sees requests that are complete
//! and allowed, and a refusal carries a request id too.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Error, Router};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Frame, SizeHint};
use tokio::time::timeout;
use tracing::Instrument;

use crate::App;
use crate::error::{ApiError, with_causes};
use crate::options::Setup;
use crate::request::random_hex;
use crate::trace::{RequestSpan, scope};

/// The header that names a request, in the log and in the answer.
pub(crate) const REQUEST_ID: &str = "x-request-id";
/// Characters of a request id that a client chose.
const REQUEST_ID_MAX: usize = 128;

#[derive(Clone)]
struct Door {
    app: App,
    setup: Arc<Setup>,
}

/// Puts the front door before the routes.
pub(crate) fn guard(routes: Router<App>, app: &App, setup: Setup) -> Router<App> {
    let cors = setup.cors.clone();
    let door = Door { app: app.clone(), setup: Arc::new(setup) };
    let routes = routes
        .layer(DefaultBodyLimit::max(app.max_body_bytes))
        .layer(middleware::from_fn_with_state(door.clone(), admit));
    let routes = match cors {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    routes.layer(middleware::from_fn_with_state(door, observe))
}

/// Whether a path needs no key and makes no span: probes and scrapers come often and know no secret.
fn is_for_operators(path: &str) -> bool {
    path.starts_with("/health") || path == "/metrics"
}

async fn admit(State(door): State<Door>, request: Request, next: Next) -> Response {
    match door.admitted(request).await {
        Ok(request) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

impl Door {
    async fn admitted(&self, request: Request) -> Result<Request, ApiError> {
        if let Some(key) = self.setup.options.api_key.as_ref().filter(|_| !is_for_operators(request.uri().path())) {
            key.check(request.headers())?;
        }
        let (head, body) = request.into_parts();
        let limit = self.setup.options.max_body_bytes;
        if body.size_hint().lower() > limit as u64 {
            return Err(ApiError::BodyTooLarge { limit });
        }
        let seconds = self.setup.options.request_read_timeout;
        let read = timeout(seconds, Limited::new(body, limit).collect()).await;
        match read.map_err(|_| ApiError::RequestTimeout { seconds: seconds.as_secs() })? {
            Ok(body) => Ok(Request::from_parts(head, Body::from(body.to_bytes()))),
            Err(error) if error.is::<LengthLimitError>() => Err(ApiError::BodyTooLarge { limit }),
            Err(error) => {
                // The outer error says what the inner one says.
                let cause = error.downcast::<Error>().map_or_else(|error| error, |error| error.into_inner());
                Err(ApiError::bad_body(format!("The body could not be read: {}.", with_causes(cause.as_ref()))))
            }
        }
    }
}

async fn observe(State(door): State<Door>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let log = tracing::info_span!("request", id = id.to_str().unwrap_or_default(), %method, path);
    let is_quiet = is_for_operators(&path);
    let tracer = door.setup.tracer.as_ref().filter(|_| !is_quiet);
    let span = tracer.map(|tracer| tracer.begin(&request, &route, &door.app.engine.info().name));
    let mut watch = Watch { began, log: log.clone(), is_quiet, status: None, is_whole: false, span: span.clone() };
    let mut response = scope(span, next.run(request)).instrument(log).await;
    door.app.metrics.count(&route, response.status().as_u16());
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    headers.insert(header::SERVER, HeaderValue::from_static(concat!("bcg/", env!("CARGO_PKG_VERSION"))));
    watch.status = Some(response.status().as_u16());
    response.map(|body| {
        watch.is_whole = body.is_end_stream();
        Body::new(Watched { body, watch })
    })
}

/// Takes the client's id, so that logs on both sides can be joined, or makes one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|id| {
        let id = id.as_bytes();
        (1..=REQUEST_ID_MAX).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
    });
    let made = || HeaderValue::from_str(&random_hex()).unwrap_or(HeaderValue::from_static("-"));
    given.cloned().unwrap_or_else(made)
}

/// Says how a request ended once nothing of it is left: when its answer is out, or the client gone.
struct Watch {
    began: Instant,
    log: tracing::Span,
    is_quiet: bool,
    /// Of the answer, if there is one.
    status: Option<u16>,
    /// The whole answer was handed to the connection.
    is_whole: bool,
    span: Option<RequestSpan>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let (status, is_whole) = (self.status, self.is_whole);
        if let Some(span) = &self.span {
            span.end(status, is_whole);
        }
        let ms = format!("{:.1}", self.began.elapsed().as_secs_f64() * 1e3);
        self.log.in_scope(|| match (status, is_whole, self.is_quiet) {
            (Some(status), true, false) => tracing::info!(status, ms, "answered"),
            (Some(status), true, true) => tracing::debug!(status, ms, "answered"),
            _ => tracing::info!(status, ms, "the client left"),
        });
    }
}

/// The body of an answer; dropping it ends the [`Watch`].
struct Watched {
    body: Body,
    watch: Watch,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(None) => self.watch.is_whole = true,
            Poll::Ready(Some(Ok(_))) => self.watch.is_whole = self.body.is_end_stream(),
            _ => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_the_clients_if_it_is_one_short_word() {
        let id = |value: &[u8]| {
            let value = HeaderValue::from_bytes(value).expect("a header's value");
            request_id(&HeaderMap::from_iter([(header::HeaderName::from_static(REQUEST_ID), value)]))
        };
        assert_eq!(id(b"abc-1"), "abc-1");
        for odd in [&b""[..], b"a b", b"\xff", &[b'x'; 129]] {
            let made = id(odd);
            assert!(made.len() == 32 && made != id(odd), "{made:?}");
        }
    }

    #[test]
    fn probes_and_scrapers_need_no_key() {
        assert!(["/health", "/health_generate", "/metrics"].iter().all(|path| is_for_operators(path)));
        assert!(!["/", "/v1/models", "/metrics/", "/v1/health"].iter().any(|path| is_for_operators(path)));
    }
}
