//! What every request passes on its way to a route, and every answer on its way back.
//!
//! From the outside in: a request id, the log line, the count and the span of the request, and whether the server still
//! takes it ([`observe`]); CORS; the API key, who the client is, and the whole body, in time and within its limits
//! ([`admit`]). So a route only ever sees requests that are complete and allowed, and a refusal carries a request id too.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Extensions, HeaderMap, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Error, Router};
use bcg_engine::{ClientId, FairPlaces, Place};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::time::timeout;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;

use crate::App;
use crate::client::{self, Peer};
use crate::error::{ApiError, with_causes};
use crate::incoming::Admitted;
use crate::options::{Setup, shown_key};
use crate::request::random_hex;
use crate::trace::{RequestSpan, scope};

/// The header that names a request, in the log and in the answer.
pub(crate) const REQUEST_ID: &str = "x-request-id";
/// Characters of a request id that a client chose.
const REQUEST_ID_MAX: usize = 128;
/// Bytes of a body that are not counted among those of all bodies, because the number of connections bounds them.
const UNCOUNTED_BODY_BYTES: usize = 64 << 10;
/// How long the rest of a refused body is read: a client that still writes might miss the answer.
const REFUSED_READ: Duration = Duration::from_secs(1);

/// Puts the front door before the routes of the public port.
pub(crate) fn guard(routes: Router<App>, app: &App, setup: Arc<Setup>) -> Router<App> {
    let cors = setup.cors.clone();
    let bodies = FairPlaces::new(setup.options.max_inflight_body_bytes);
    let door = Door { app: app.clone(), setup, bodies, is_for_operators: false };
    let routes = routes.layer(middleware::from_fn_with_state(door.clone(), admit));
    let routes = match cors {
        Some(cors) => routes.layer(cors),
        None => routes,
    };
    routes.layer(middleware::from_fn_with_state(door, observe))
}

/// Names and counts the requests of the operators' port, which are all let in.
pub(crate) fn guard_operators(routes: Router<App>, app: &App, setup: Arc<Setup>) -> Router<App> {
    let door = Door { app: app.clone(), setup, bodies: FairPlaces::new(0), is_for_operators: true };
    routes.layer(middleware::from_fn_with_state(door, observe))
}

#[derive(Clone)]
struct Door {
    app: App,
    setup: Arc<Setup>,
    /// The bytes of all bodies.
    bodies: FairPlaces,
    is_for_operators: bool,
}

/// Whether a path needs no key, and is answered while the server ends: probes and scrapers know no secret.
fn is_open(path: &str) -> bool {
    path == "/health" || path == "/metrics"
}

/// Whether a path makes no span, and no line in the log: probes and scrapers come often.
fn is_quiet(path: &str) -> bool {
    is_open(path) || path == "/health_generate"
}

async fn admit(State(door): State<Door>, request: Request, next: Next) -> Response {
    match door.admitted(request).await {
        Ok(request) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

impl Door {
    async fn admitted(&self, request: Request) -> Result<Request, ApiError> {
        let (mut head, body) = request.into_parts();
        let client = self.client(&head.extensions, &head.headers, head.uri.path())?;
        if is_open(head.uri.path()) {
            // Nobody needs a key for these, and none of them reads a body: it costs nothing, and is not waited for.
            return Ok(Request::from_parts(head, Body::empty()));
        }
        let seconds = self.setup.options.request_read_timeout;
        let read = timeout(seconds, self.read(body, &client)).await;
        let (body, bytes) = read.map_err(|_| ApiError::RequestTimeout { seconds: seconds.as_secs() })??;
        head.extensions.insert(Admitted { client, bytes: Arc::new(bytes) });
        Ok(Request::from_parts(head, Body::from(body)))
    }

    /// Who the client is, if it may ask for this.
    fn client(&self, extensions: &Extensions, headers: &HeaderMap, path: &str) -> Result<ClientId, ApiError> {
        let keys = &self.setup.options.api_key;
        if keys.is_empty() || is_open(path) {
            return Ok(extensions.get::<Peer>().map_or_else(ClientId::default, |Peer(client)| client.clone()));
        }
        shown_key(keys, headers).map(client::of_key)
    }

    /// Reads a body into one piece. Its bytes count as they arrive, not as they are announced.
    async fn read(&self, mut body: Body, client: &ClientId) -> Result<(Vec<u8>, Place), ApiError> {
        let limit = self.setup.options.max_body_bytes;
        if body.size_hint().lower() > limit as u64 {
            return Err(ApiError::BodyTooLarge { limit });
        }
        let full = ApiError::BodiesFull { limit: self.setup.options.max_inflight_body_bytes };
        let mut place = self.bodies.try_take(client, 0).ok_or_else(|| full.clone())?;
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                // The outer error says what the inner one says.
                ApiError::bad_body(format!("The body could not be read: {}.", with_causes(error.into_inner().as_ref())))
            })?;
            let Ok(data) = frame.into_data() else { continue };
            let length = bytes.len() + data.len();
            if length > limit {
                return Err(ApiError::BodyTooLarge { limit });
            }
            let more = length.saturating_sub(UNCOUNTED_BODY_BYTES + place.weight());
            if !place.grow(more) {
                drop((bytes, place));
                let rest = async { while let Some(Ok(_)) = body.frame().await {} };
                // Whether all of it came changes nothing.
                let _ = timeout(REFUSED_READ, rest).await;
                return Err(full);
            }
            bytes.extend_from_slice(&data);
        }
        bytes.shrink_to_fit();
        Ok((bytes, place))
    }

    /// Counts a request as running, if the server still takes it.
    fn enter(&self, path: &str) -> Result<Option<TaskTrackerToken>, ApiError> {
        if self.is_for_operators || is_open(path) {
            return Ok(None);
        }
        self.app.drain.enter().map(Some).ok_or(ApiError::ShuttingDown)
    }
}

async fn observe(State(door): State<Door>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let log = tracing::info_span!("request", id = id.to_str().unwrap_or_default(), %method, path);
    let is_quiet = is_quiet(&path);
    let tracer = door.setup.tracer.as_ref().filter(|_| !is_quiet);
    let span = tracer.map(|tracer| tracer.begin(&request, &route, &door.app.engine.info().name));
    let (running, refused) = match door.enter(&path) {
        Ok(running) => (running, None),
        Err(error) => (None, Some(error)),
    };
    let mut watch = Watch {
        began,
        log: log.clone(),
        is_quiet,
        status: None,
        is_whole: false,
        span: span.clone(),
        _running: running,
    };
    let mut response = match refused {
        Some(error) => error.into_response(),
        None => scope(span, next.run(request)).instrument(log).await,
    };
    door.app.metrics.count(&route, response.status().as_u16());
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    headers.insert(header::SERVER, HeaderValue::from_static(concat!("bcg/", env!("CARGO_PKG_VERSION"))));
    if door.app.drain.has_begun() && !is_open(&path) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
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
    /// Keeps the server from ending before this request.
    _running: Option<TaskTrackerToken>,
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
        assert!(["/health", "/metrics"].iter().all(|path| is_open(path) && is_quiet(path)));
        assert!(!["/", "/v1/models", "/metrics/", "/v1/health", "/health_generate"].iter().any(|path| is_open(path)));
    }
}
