//! `POST /tokenize` and `POST /detokenize`, in the shape that vLLM and SGLang share.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use bcg_engine::{Engine, Prompt, SubmitError};
use serde_json::{Value, json};

use crate::App;
use crate::chat;
use crate::completions::prompts;
use crate::error::ApiError;
use crate::fields::BodyFields;
use crate::request::check_model;
use crate::tools::Tools;

/// Turns a text, several texts or a conversation into tokens.
pub(crate) async fn encode(
    State(app): State<App>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let fields = BodyFields::parse(body, app.max_body_bytes)?;
    check_model(&fields, app.engine.info())?;
    let add_special = fields.get("add_special_tokens")?.unwrap_or(true);
    let spell = fields.get("return_token_strs")?.unwrap_or(false);
    let text = fields.get::<Value>("prompt")?;
    let is_batch = text.as_ref().is_some_and(Value::is_array);
    let conversation = fields.get::<Value>("messages")?.is_some();
    let texts = match (text, conversation) {
        (Some(text), false) => prompts("prompt", text)?,
        (None, true) => {
            fields.refuse("add_generation_prompt", &[json!(true)], "leave it out or set it to true")?;
            vec![chat::prompt(&fields, &Tools::read(&fields)?)?]
        }
        _ => return Err(ApiError::invalid("prompt", "Give either `prompt` or `messages`.")),
    };
    let max_model_len = app.engine.info().context_length;
    app.with_engine(move |engine| {
        let tokens = texts.into_iter().map(|text| encode_one(engine, text, add_special));
        let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        let mut answer = json!({"max_model_len": max_model_len});
        let counts: Vec<usize> = tokens.iter().map(Vec::len).collect();
        if spell {
            let spell =
                |ids: &Vec<u32>| ids.iter().map(|&id| engine.decode(&[id], false)).collect::<Result<Vec<_>, _>>();
            answer["token_strs"] = one_or_all(is_batch, tokens.iter().map(spell).collect::<Result<_, _>>()?);
        }
        answer["count"] = one_or_all(is_batch, counts);
        answer["tokens"] = one_or_all(is_batch, tokens);
        Ok(Json(answer))
    })
    .await
}

fn encode_one(engine: &dyn Engine, prompt: Prompt, add_special: bool) -> Result<Vec<u32>, SubmitError> {
    match prompt {
        Prompt::Text(text) => engine.encode(&text, add_special),
        prompt => engine.prompt_tokens(prompt),
    }
}

/// Turns tokens, or several lists of them, into text.
pub(crate) async fn decode(
    State(app): State<App>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let fields = BodyFields::parse(body, app.max_body_bytes)?;
    check_model(&fields, app.engine.info())?;
    let skip_special = fields.get("skip_special_tokens")?.unwrap_or(true);
    let tokens = fields.require::<Value>("tokens")?;
    let is_batch = tokens.get(0).is_some_and(Value::is_array);
    let lists = if is_batch { fields.require::<Vec<Vec<u32>>>("tokens")? } else { vec![fields.require("tokens")?] };
    app.with_engine(move |engine| {
        let texts = lists.iter().map(|list| engine.decode(list, skip_special)).collect::<Result<Vec<_>, _>>()?;
        let text = one_or_all(is_batch, texts);
        // vLLM calls it `prompt`, SGLang `text`.
        Ok(Json(json!({"prompt": text, "text": text})))
    })
    .await
}

/// An array for a batch, and its only entry otherwise.
fn one_or_all<T: Into<Value>>(is_batch: bool, items: Vec<T>) -> Value {
    let mut items = items.into_iter().map(Into::into);
    if is_batch { items.collect() } else { items.next().unwrap_or_default() }
}
