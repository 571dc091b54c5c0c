//! `GET /metrics`.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::App;
use crate::metrics::CONTENT_TYPE;

/// All metrics as OpenMetrics text, which Prometheus reads.
pub(super) async fn metrics(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], app.engine.metrics().render()).into_response()
}
