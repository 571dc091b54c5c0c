//! What answers while there is no engine: every request gets 503, with the reason and when to try again.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::error::{ApiError, HttpError};
use crate::listen::{answer_once, pause_after};
use crate::options::{HttpOptions, Setup};
use crate::tls::Acceptor;

/// Connections that are answered at once; further ones wait in the listener's backlog.
const CONNECTIONS_MAX: usize = 128;
/// How long one answer may take, the request included.
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// When clients are told to try again, in seconds.
const RETRY_AFTER: u64 = 2;

/// Answers every request 503 with `reason`, and `/health` with `status` too, until the future is dropped. Connections are
/// closed after their answer, so that none of them hides the engine that comes.
///
/// # Errors
/// [`HttpError`] as [`HttpOptions::check`].
pub async fn stand_by(
    listener: TcpListener,
    options: &HttpOptions,
    status: &'static str,
    reason: String,
) -> Result<Infallible, HttpError> {
    let setup = Setup::new(options)?;
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(ANSWER_TIME);
    let standby = Arc::new(Standby { http, tls: setup.tls, status, reason });
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { std::future::pending().await };
        match listener.accept().await {
            Ok((stream, _)) => {
                let standby = Arc::clone(&standby);
                tokio::spawn(async move {
                    // Whether the client heard it changes nothing.
                    let respond = |path: &str| standby.response(path == "/health");
                    let answered = answer_once(&standby.http, standby.tls.as_ref(), stream, respond);
                    let _ = timeout(ANSWER_TIME, answered).await;
                    drop(place);
                });
            }
            Err(error) => pause_after(&error).await,
        }
    }
}

struct Standby {
    http: http1::Builder,
    tls: Option<Acceptor>,
    status: &'static str,
    reason: String,
}

impl Standby {
    fn response(&self, is_health: bool) -> Response {
        let mut response = if is_health {
            let body = json!({"status": self.status, "reason": self.reason});
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        } else {
            ApiError::Unavailable { reason: self.reason.clone() }.into_response()
        };
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER));
        response
    }
}
