//! `GET /server_info` and `GET /model_info`, also under SGLang's older names `/get_server_info` and `/get_model_info`.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::App;

/// How the engine is set up and what it holds.
pub(super) async fn server(State(app): State<App>) -> Json<Value> {
    let mut info = app.engine.server_info();
    info["version"] = json!(env!("CARGO_PKG_VERSION"));
    Json(info)
}

/// What the served model is.
pub(super) async fn model(State(app): State<App>) -> Json<Value> {
    let info = app.engine.info();
    let tokenizer = info.has_tokenizer.then_some(&info.name);
    Json(json!({
        "model_path": info.name,
        "tokenizer_path": tokenizer,
        "is_generation": true,
        "max_model_len": info.context_length,
        "vocab_size": info.vocab_size,
    }))
}
