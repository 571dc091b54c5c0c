//! `GET /server_info` and `GET /model_info`, also under SGLang's older names `/get_server_info` and `/get_model_info`.
//!
//! Beside what the engine says of itself stand the fields by which SGLang's gateway and clients know a server, under
//! SGLang's names: a gateway calls the model by `served_model_name`, else by `model_path`.

use axum::Json;
use axum::extract::State;
use bcg_engine::ModelInfo;
use serde_json::{Value, json};

use crate::App;

/// What SGLang calls a server that computes prompts and answers both.
const NO_DISAGGREGATION: &str = "null";

/// How the engine is set up and what it holds.
pub(crate) async fn server(State(app): State<App>) -> Json<Value> {
    Json(server_json(app.engine.server_info(), app.engine.info()))
}

/// What the served model is.
pub(crate) async fn model(State(app): State<App>) -> Json<Value> {
    Json(model_json(&app.engine.server_info(), app.engine.info()))
}

/// Returns what an engine said when it was asked how it is set up.
fn setting(server: &Value, name: &str) -> Value {
    server.get("settings").and_then(|settings| settings.get(name)).cloned().unwrap_or_default()
}

/// Where a client of SGLang loads the tokenizer from.
fn tokenizer_path(server: &Value, info: &ModelInfo) -> Option<Value> {
    info.has_tokenizer.then(|| setting(server, "model_path"))
}

fn server_json(mut server: Value, info: &ModelInfo) -> Value {
    let fields = [
        ("version", json!(env!("CARGO_PKG_VERSION"))),
        ("served_model_name", json!(info.name)),
        ("model_path", setting(&server, "model_path")),
        ("tokenizer_path", json!(tokenizer_path(&server, info))),
        ("tp_size", setting(&server, "tp")),
        // An engine of several replicas says how many it has.
        ("dp_size", server.get("dp_size").cloned().unwrap_or(json!(1))),
        ("max_running_requests", setting(&server, "max_running_requests")),
        ("disaggregation_mode", json!(NO_DISAGGREGATION)),
    ];
    for (name, value) in fields {
        server[name] = value;
    }
    server
}

fn model_json(server: &Value, info: &ModelInfo) -> Value {
    let architectures = Some(setting(server, "architecture")).filter(|name| !name.is_null()).map(|name| vec![name]);
    json!({
        "model_path": setting(server, "model_path"),
        "tokenizer_path": tokenizer_path(server, info),
        "served_model_name": info.name,
        "is_generation": true,
        "model_type": setting(server, "model_type"),
        "architectures": architectures,
        "max_model_len": info.context_length,
        "vocab_size": info.vocab_size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(has_tokenizer: bool) -> ModelInfo {
        ModelInfo { name: "mine".into(), created: 7, context_length: 100, vocab_size: 50, has_tokenizer }
    }

    fn server() -> Value {
        json!({"model": "mine", "settings": {
            "model_path": "/models/mine", "tp": 2, "max_running_requests": 8, "architecture": "Qwen3ForCausalLM",
            "model_type": "qwen3"}})
    }

    #[test]
    fn a_gateway_finds_the_models_name_and_path() {
        let told = server_json(server(), &info(true));
        for (name, value) in [
            ("served_model_name", json!("mine")),
            ("model_path", json!("/models/mine")),
            ("tokenizer_path", json!("/models/mine")),
            ("tp_size", json!(2)),
            ("dp_size", json!(1)),
            ("max_running_requests", json!(8)),
            ("disaggregation_mode", json!("null")),
            ("model", json!("mine")),
        ] {
            assert_eq!(told[name], value, "{name}");
        }
        assert_eq!(told["settings"], server()["settings"], "what the engine says stays");
    }

    #[test]
    fn a_model_is_described_by_its_configuration() {
        let told = model_json(&server(), &info(true));
        assert_eq!((&told["model_type"], &told["architectures"]), (&json!("qwen3"), &json!(["Qwen3ForCausalLM"])));
        assert_eq!((&told["model_path"], &told["served_model_name"]), (&json!("/models/mine"), &json!("mine")));
        let unknown = model_json(&json!({}), &info(false));
        assert!(
            ["model_path", "tokenizer_path", "model_type", "architectures"].iter().all(|name| unknown[name].is_null())
        );
    }

    #[test]
    fn an_engine_of_several_replicas_keeps_their_number() {
        let mut several = server();
        several["dp_size"] = json!(3);
        assert_eq!(server_json(several, &info(true))["dp_size"], 3);
    }

    #[test]
    fn without_a_tokenizer_none_is_offered() {
        assert!(server_json(server(), &info(false))["tokenizer_path"].is_null());
        assert!(model_json(&server(), &info(false))["tokenizer_path"].is_null());
    }
}
