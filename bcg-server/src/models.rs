//! `GET /v1/models` and `GET /v1/models/{name}`.

use axum::Json;
use axum::extract::{Path, State};
use bcg_engine::ModelInfo;
use serde_json::{Value, json};

use crate::App;
use crate::error::ApiError;

/// Lists the one model that is served.
pub(crate) async fn list(State(app): State<App>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model_json(app.engine.info())]}))
}

/// Describes the model, if it is the one that is served.
pub(crate) async fn retrieve(State(app): State<App>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let info = app.engine.info();
    if name != info.name {
        return Err(ApiError::ModelNotFound(name, info.name.clone()));
    }
    Ok(Json(model_json(info)))
}

fn model_json(info: &ModelInfo) -> Value {
    json!({
        "id": info.name,
        "object": "model",
        "created": info.created,
        "owned_by": "bcg",
        "max_model_len": info.context_length,
    })
}
