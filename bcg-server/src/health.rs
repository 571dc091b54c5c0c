//! `GET /health` and `GET /health_generate`.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bcg_engine::{GenerationRequest, Health, Prompt};
use serde_json::json;

use crate::App;
use crate::answers::collect;

/// How long one token may take before the engine counts as stuck.
const GENERATE_DEADLINE: Duration = Duration::from_secs(20);

/// 200 while the engine serves, 503 with the reason otherwise.
pub(crate) async fn health(State(app): State<App>) -> Response {
    let (status, body) = match app.engine.health() {
        Health::Ready => (StatusCode::OK, json!({"status": "ready"})),
        Health::Draining => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "draining"})),
        Health::Failed(reason) => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "failed", "reason": reason})),
    };
    (status, Json(body)).into_response()
}

/// 200 if the engine generates a token in time, 503 with the reason otherwise.
pub(crate) async fn generate(State(app): State<App>) -> Response {
    let prompt = Prompt::Tokens(vec![0]);
    let request = GenerationRequest { max_tokens: Some(1), ignore_eos: true, ..GenerationRequest::greedy(prompt) };
    let generated =
        tokio::time::timeout(GENERATE_DEADLINE, async { collect(app.submit(vec![request], 1).await?).await });
    let reason = match generated.await {
        Ok(Ok(_)) => return (StatusCode::OK, Json(json!({"status": "ready"}))).into_response(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no token within {} seconds", GENERATE_DEADLINE.as_secs()),
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "failed", "reason": reason}))).into_response()
}
