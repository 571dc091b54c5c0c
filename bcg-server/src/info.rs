//! `GET /server_info` and `GET /model_info`, also under SGLang's older names `/get_server_info` and `/get_model_info`.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::App;

/// How the engine is set up and what it holds.
pub(crate) async fn server(State(app): State<App>) -> Json<Value> {
    let mut info = app.engine.server_info();
    info["version"] = json!(env!("CARGO_PKG_VERSION"));
    Json(info)
}

/// What the served model is.
pub(crate) async fn model(State(app): State<App>) -> Json<Value> {
    let info = app.engine.info();
    // SGLang's clients load a tokenizer from these paths.
    let path = app.engine.server_info().pointer("/settings/model_path").cloned();
    let tokenizer_path = path.clone().filter(|_| info.has_tokenizer);
    Json(json!({
        "model_path": path,
        "tokenizer_path": tokenizer_path,
        "served_model_name": info.name,
        "is_generation": true,
        "max_model_len": info.context_length,
        "vocab_size": info.vocab_size,
    }))
}
