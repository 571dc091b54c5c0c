//! `POST /v1/completions`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::App;
use super::fields::Fields;
use super::request::{AnswerShape, generation, token_count, usage_json};
use super::sse::{self, Chunks};
use crate::engine::{Delta, Event, EventStream, GenerationRequest, Prompt, TokenLogprob};
use crate::error::ApiError;

/// The most alternatives per token, as in the OpenAI API.
const LOGPROBS_MAX: usize = 5;
/// Tokens of an answer when the request does not say, as in the OpenAI API.
const MAX_TOKENS_DEFAULT: usize = 16;

/// Continues a prompt, at once or in chunks.
pub(super) async fn create(State(app): State<App>, body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    let fields = Fields::parse(body, app.max_body_bytes)?;
    let shape = AnswerShape::read(&fields, &app, "cmpl")?;
    let request = read(&fields)?;
    let logprobs = request.top_logprobs.is_some();
    let events = app.submit(request).await?;
    if shape.stream {
        return Ok(sse::respond(events, CompletionChunks { shape, logprobs }));
    }
    whole(events, &shape, logprobs).await.map(IntoResponse::into_response)
}

fn read(fields: &Fields) -> Result<GenerationRequest, ApiError> {
    fields.refuse("echo", &[json!(false)], "the answer never repeats the prompt, so leave `echo` out")?;
    fields.refuse("suffix", &[json!("")], "leave it out")?;
    let prompt = prompt(fields.require("prompt")?)?;
    let top_logprobs = fields.number("logprobs", 0, LOGPROBS_MAX)?;
    let max_tokens = token_count(fields, "max_tokens")?.unwrap_or(MAX_TOKENS_DEFAULT);
    generation(fields, prompt, Some(max_tokens), top_logprobs)
}

/// Reads the four forms of a prompt; several prompts in one request are refused.
fn prompt(value: Value) -> Result<Prompt, ApiError> {
    let refuse = |what: &str| {
        Err(ApiError::invalid(
            "prompt",
            format!("Invalid value for `prompt`: {what}; give a string, an array of one string, or token ids."),
        ))
    };
    match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(mut items) => match items.as_slice() {
            [] => refuse("the array is empty"),
            [Value::String(_) | Value::Array(_)] => prompt(items.remove(0)),
            [Value::String(_) | Value::Array(_), ..] => {
                refuse(&format!("{} prompts in one request are not supported, send one request each", items.len()))
            }
            _ => {
                let ids = items.iter().map(|item| item.as_u64().and_then(|id| u32::try_from(id).ok()));
                match ids.collect::<Option<Vec<u32>>>() {
                    Some(ids) => Ok(Prompt::Tokens(ids)),
                    None => refuse("token ids are integers from 0"),
                }
            }
        },
        _ => refuse("it is neither a string nor an array"),
    }
}

async fn whole(mut events: EventStream, shape: &AnswerShape, logprobs: bool) -> Result<Json<Value>, ApiError> {
    let (mut text, mut tokens, mut entries) = (String::new(), Vec::new(), Vec::new());
    loop {
        match events.next().await {
            Some(Event::Delta(delta)) => {
                text += &delta.text;
                tokens.extend(delta.tokens);
                entries.extend(delta.logprobs);
            }
            Some(Event::Finished { reason, usage }) => {
                let mut answer = shape.object("text_completion");
                let logprobs = logprobs.then(|| logprobs_json(&entries));
                let ids = shape.token_ids.then_some(tokens.as_slice());
                answer.insert("choices".into(), choice(&text, ids, logprobs.as_ref(), Some(reason.as_str())));
                answer.insert("usage".into(), usage_json(usage));
                return Ok(Json(answer.into()));
            }
            Some(Event::Failed(message)) => return Err(ApiError::Engine(message)),
            None => return Err(ApiError::Engine("the answer ended without a reason".into())),
        }
    }
}

fn choice(text: &str, token_ids: Option<&[u32]>, logprobs: Option<&Value>, finish_reason: Option<&str>) -> Value {
    let mut choice = json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason});
    if let Some(token_ids) = token_ids {
        choice["token_ids"] = json!(token_ids);
    }
    json!([choice])
}

struct CompletionChunks {
    shape: AnswerShape,
    logprobs: bool,
}

impl CompletionChunks {
    fn chunk(&self, delta: &Delta, finish_reason: Option<&str>) -> Value {
        let mut chunk = self.shape.object("text_completion");
        let logprobs = (self.logprobs && !delta.logprobs.is_empty()).then(|| logprobs_json(&delta.logprobs));
        let ids = self.shape.token_ids.then_some(delta.tokens.as_slice());
        chunk.insert("choices".into(), choice(&delta.text, ids, logprobs.as_ref(), finish_reason));
        if self.shape.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        chunk.into()
    }
}

impl Chunks for CompletionChunks {
    fn opening(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn chunks(&mut self, event: Event) -> Vec<Value> {
        match event {
            Event::Delta(delta) if !self.shape.token_ids && delta.text.is_empty() && delta.logprobs.is_empty() => {
                Vec::new()
            }
            Event::Delta(delta) => vec![self.chunk(&delta, None)],
            Event::Finished { reason, usage } => {
                let mut chunks = vec![self.chunk(&Delta::default(), Some(reason.as_str()))];
                if self.shape.include_usage {
                    let mut last = self.shape.object("text_completion");
                    last.insert("choices".into(), json!([]));
                    last.insert("usage".into(), usage_json(usage));
                    chunks.push(last.into());
                }
                chunks
            }
            Event::Failed(_) => Vec::new(),
        }
    }
}

fn logprobs_json(entries: &[TokenLogprob]) -> Value {
    let top: Vec<Value> = entries
        .iter()
        .map(|entry| {
            let mut map = Map::new();
            for token in entry.top.iter().chain([&entry.token]) {
                map.entry(token.text.clone()).or_insert_with(|| json!(token.logprob));
            }
            map.into()
        })
        .collect();
    json!({
        "tokens": entries.iter().map(|entry| entry.token.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": entries.iter().map(|entry| entry.token.logprob).collect::<Vec<_>>(),
        "top_logprobs": top,
        "text_offset": entries.iter().map(|entry| entry.text_offset).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_text_or_tokens() {
        assert_eq!(prompt(json!("a")), Ok(Prompt::Text("a".into())));
        assert_eq!(prompt(json!(["a"])), Ok(Prompt::Text("a".into())));
        assert_eq!(prompt(json!([1, 2])), Ok(Prompt::Tokens(vec![1, 2])));
        assert_eq!(prompt(json!([[1, 2]])), Ok(Prompt::Tokens(vec![1, 2])));
    }

    #[test]
    fn other_prompts_are_refused_by_name() {
        for bad in [json!([]), json!(["a", "b"]), json!([[1], [2]]), json!([1, -2]), json!(7), json!([1, "a"])] {
            let error = prompt(bad.clone()).expect_err("refused");
            assert!(matches!(error, ApiError::InvalidRequest { param: Some("prompt"), .. }), "{bad}");
        }
    }
}
