//! `GET /health`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::App;
use crate::engine::Health;

/// 200 while the engine serves, 503 with the reason otherwise.
pub(super) async fn health(State(app): State<App>) -> Response {
    let (status, body) = match app.engine.health() {
        Health::Ready => (StatusCode::OK, json!({"status": "ready"})),
        Health::Draining => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "draining"})),
        Health::Failed(reason) => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "failed", "reason": reason})),
    };
    (status, Json(body)).into_response()
}
