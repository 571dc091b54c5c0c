//! `POST /v1/chat/completions`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use super::fields::Fields;
use super::request::{AnswerShape, generation, token_count, usage_json};
use super::sse::{self, Chunks};
use crate::engine::{ChatMessage, Event, EventStream, GenerationRequest, Prompt, TokenLogprob, TokenText};
use crate::error::ApiError;

/// The most alternatives per token, as in the OpenAI API.
const TOP_LOGPROBS_MAX: usize = 20;

/// Answers a conversation, at once or in chunks.
pub(super) async fn create(State(app): State<App>, body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    let fields = Fields::parse(body, app.max_body_bytes)?;
    let shape = AnswerShape::read(&fields, &app, "chatcmpl")?;
    let request = read(&fields)?;
    let logprobs = request.top_logprobs.is_some();
    let events = app.submit(request).await?;
    if shape.stream {
        return Ok(sse::respond(events, ChatChunks { shape, logprobs }));
    }
    whole(events, &shape, logprobs).await.map(IntoResponse::into_response)
}

fn read(fields: &Fields) -> Result<GenerationRequest, ApiError> {
    let messages: Vec<ChatMessage> = fields.require("messages")?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` needs at least one message."));
    }
    fields.refuse("tools", &[json!([])], "leave it out")?;
    fields.refuse("functions", &[json!([])], "leave it out")?;
    fields.refuse("response_format", &[json!({"type": "text"})], "leave it out or set it to {\"type\": \"text\"}")?;
    let newer = token_count(fields, "max_completion_tokens")?;
    let max_tokens = newer.or(token_count(fields, "max_tokens")?);
    let template_args = fields.get("chat_template_kwargs")?.unwrap_or_default();
    generation(fields, Prompt::Chat { messages, tools: Value::Null, template_args }, max_tokens, top_logprobs(fields)?)
}

fn top_logprobs(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.get::<bool>("logprobs")?.unwrap_or(false);
    let top = fields.number("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
    if top.is_some() && !wanted {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` is only allowed when `logprobs` is true."));
    }
    Ok(wanted.then(|| top.unwrap_or(0)))
}

async fn whole(mut events: EventStream, shape: &AnswerShape, logprobs: bool) -> Result<Json<Value>, ApiError> {
    let (mut text, mut entries) = (String::new(), Vec::new());
    loop {
        match events.next().await {
            Some(Event::Delta(delta)) => {
                text += &delta.text;
                entries.extend(delta.logprobs);
            }
            Some(Event::Finished { reason, usage }) => {
                let mut answer = shape.object("chat.completion");
                let message = json!({"role": "assistant", "content": text, "refusal": null});
                answer.insert(
                    "choices".into(),
                    json!([{
                        "index": 0,
                        "message": message,
                        "logprobs": logprobs.then(|| logprobs_json(&entries)),
                        "finish_reason": reason.as_str(),
                    }]),
                );
                answer.insert("usage".into(), usage_json(usage));
                return Ok(Json(answer.into()));
            }
            Some(Event::Failed(message)) => return Err(ApiError::Engine(message)),
            None => return Err(ApiError::Engine("the answer ended without a reason".into())),
        }
    }
}

struct ChatChunks {
    shape: AnswerShape,
    logprobs: bool,
}

impl ChatChunks {
    fn chunk(&self, delta: &Value, logprobs: &[TokenLogprob], finish_reason: Option<&str>) -> Value {
        let mut chunk = self.shape.object("chat.completion.chunk");
        let logprobs = (self.logprobs && !logprobs.is_empty()).then(|| logprobs_json(logprobs));
        chunk.insert(
            "choices".into(),
            json!([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]),
        );
        if self.shape.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        chunk.into()
    }
}

impl Chunks for ChatChunks {
    fn opening(&mut self) -> Vec<Value> {
        vec![self.chunk(&json!({"role": "assistant", "content": ""}), &[], None)]
    }

    fn chunks(&mut self, event: Event) -> Vec<Value> {
        match event {
            Event::Delta(delta) if delta.text.is_empty() && delta.logprobs.is_empty() => Vec::new(),
            Event::Delta(delta) => vec![self.chunk(&json!({"content": delta.text}), &delta.logprobs, None)],
            Event::Finished { reason, usage } => {
                let mut chunks = vec![self.chunk(&json!({}), &[], Some(reason.as_str()))];
                if self.shape.include_usage {
                    let mut last = self.shape.object("chat.completion.chunk");
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
    let token =
        |token: &TokenText| json!({"token": token.text, "logprob": token.logprob, "bytes": token.text.as_bytes()});
    let content: Vec<Value> = entries
        .iter()
        .map(|entry| {
            let mut value = token(&entry.token);
            value["top_logprobs"] = entry.top.iter().map(token).collect();
            value
        })
        .collect();
    json!({"content": content, "refusal": null})
}
