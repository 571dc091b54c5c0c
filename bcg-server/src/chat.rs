//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bcg_engine::{EngineEvent, FinishReason, GenerationRequest, ModelInfo, Prompt, TokenLogprob, TokenText};
use serde_json::{Value, json};

use crate::App;
use crate::answers::{Answer, TotalUsage, collect};
use crate::error::ApiError;
use crate::fields::BodyFields;
use crate::incoming::{Asked, Incoming};
use crate::messages;
use crate::request::{AnswerShape, check_choices, generation, priority, token_count};
use crate::sse::{self, Chunks};
use crate::tools::Tools;
use crate::tools::calls::{CallParser, Piece};

/// The most alternatives per token, as in the OpenAI API.
const TOP_LOGPROBS_MAX: usize = 20;

/// What the chunks of a stream call themselves.
const CHUNK: &str = "chat.completion.chunk";

/// Answers a conversation, at once or in chunks.
pub(crate) async fn create(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    let read = |app: &App, fields: &BodyFields| {
        let info = app.engine.info();
        let shape = AnswerShape::read(fields, info, "chatcmpl")?;
        let tools = Tools::read(fields)?;
        let request = read(fields, info, &tools)?;
        check_choices("n", 1, shape.n)?;
        let logprobs = request.top_logprobs.is_some();
        let asked = Asked { requests: vec![request], n: shape.n, priority: priority(fields)? };
        Ok((asked, (shape, tools.parser(), logprobs)))
    };
    let (answers, (shape, parser, logprobs)) = app.generate(incoming, read).await?;
    if shape.stream {
        let (usage, parsers) = (TotalUsage::new(shape.n), vec![parser; shape.n]);
        return Ok(sse::respond(answers, ChatChunks { shape, logprobs, parsers, usage }));
    }
    let (mut usage, mut choices) = (TotalUsage::new(shape.n), Vec::with_capacity(shape.n));
    for (index, answer) in collect(answers).await?.iter().enumerate() {
        usage.add(index, answer.usage);
        choices.push(choice(index, answer, parser.clone(), logprobs));
    }
    Ok(Json(shape.whole("chat.completion", choices, usage.total())).into_response())
}

/// Turns the fields that say what the conversation is into a prompt.
pub(crate) fn prompt(fields: &BodyFields, tools: &Tools) -> Result<Prompt, ApiError> {
    let messages = messages::read(fields)?;
    let template_args = fields.object("chat_template_kwargs")?.unwrap_or_default();
    Ok(Prompt::Chat { messages, tools: tools.for_template(), template_args })
}

fn read(fields: &BodyFields, info: &ModelInfo, tools: &Tools) -> Result<GenerationRequest, ApiError> {
    let prompt = prompt(fields, tools)?;
    fields.refuse("functions", &[json!([])], "use `tools`")?;
    fields.refuse("function_call", &[json!("none")], "use `tool_choice`")?;
    fields.refuse("audio", &[], "leave it out; this model reads and writes text")?;
    fields.refuse("modalities", &[json!([]), json!(["text"])], "leave it out or set it to [\"text\"]")?;
    let newer = token_count(fields, "max_completion_tokens")?;
    let max_tokens = newer.or(token_count(fields, "max_tokens")?);
    let mut request = generation(fields, info, prompt, max_tokens, top_logprobs(fields)?)?;
    let format = request.grammar.map(Arc::unwrap_or_clone);
    request.grammar = tools.grammar(format)?.map(Arc::new);
    Ok(request)
}

fn top_logprobs(fields: &BodyFields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.get::<bool>("logprobs")?.unwrap_or(false);
    let top = fields.number("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
    if top.is_some() && !wanted {
        return Err(ApiError::invalid("top_logprobs", "`top_logprobs` is only allowed when `logprobs` is true."));
    }
    Ok(wanted.then(|| top.unwrap_or(0)))
}

fn choice(index: usize, answer: &Answer, parser: Option<CallParser>, logprobs: bool) -> Value {
    let (mut content, mut calls) = (String::new(), Vec::new());
    match parser {
        None => content.clone_from(&answer.text),
        Some(mut parser) => {
            let pieces = parser.push(&answer.text).into_iter().chain(parser.finish());
            for piece in pieces {
                match piece {
                    Piece::Content(text) => content += &text,
                    Piece::Call(call) => calls.push(call.to_json()),
                }
            }
        }
    }
    let shown = (calls.is_empty() || !content.is_empty()).then_some(content);
    let mut message = json!({"role": "assistant", "content": shown, "refusal": null});
    let finish_reason = finish_reason(answer.reason, calls.len());
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    let logprobs = logprobs.then(|| logprobs_json(&answer.logprobs));
    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason})
}

fn finish_reason(reason: FinishReason, num_calls: usize) -> &'static str {
    if num_calls > 0 && reason == FinishReason::Stop { "tool_calls" } else { reason.as_str() }
}

struct ChatChunks {
    shape: AnswerShape,
    logprobs: bool,
    /// One for each choice.
    parsers: Vec<Option<CallParser>>,
    usage: TotalUsage,
}

impl ChatChunks {
    fn chunk(&self, index: usize, delta: &Value, logprobs: &[TokenLogprob], finish_reason: Option<&str>) -> Value {
        let logprobs = (self.logprobs && !logprobs.is_empty()).then(|| logprobs_json(logprobs));
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason});
        self.shape.chunk(CHUNK, &choice)
    }

    /// The chunks of these pieces; log probabilities go with the first one, or alone.
    fn pieces(&self, index: usize, pieces: &[Piece], mut logprobs: &[TokenLogprob]) -> Vec<Value> {
        let mut chunks = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let delta = match piece {
                Piece::Content(text) => json!({"content": text}),
                Piece::Call(call) => json!({"tool_calls": [call.to_chunk()]}),
            };
            chunks.push(self.chunk(index, &delta, std::mem::take(&mut logprobs), None));
        }
        if !logprobs.is_empty() {
            chunks.push(self.chunk(index, &json!({"content": ""}), logprobs, None));
        }
        chunks
    }
}

impl Chunks for ChatChunks {
    fn opening(&mut self) -> Vec<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        (0..self.shape.n).map(|index| self.chunk(index, &delta, &[], None)).collect()
    }

    fn chunks(&mut self, index: usize, event: EngineEvent) -> Vec<Value> {
        match event {
            EngineEvent::Delta(delta) => {
                let pieces = match &mut self.parsers[index] {
                    Some(parser) => parser.push(&delta.text),
                    None if delta.text.is_empty() => Vec::new(),
                    None => vec![Piece::Content(delta.text)],
                };
                self.pieces(index, &pieces, &delta.logprobs)
            }
            EngineEvent::Finished { reason, usage } => {
                self.usage.add(index, usage);
                let pieces = self.parsers[index].as_mut().map(CallParser::finish).unwrap_or_default();
                let num_calls = self.parsers[index].as_ref().map_or(0, CallParser::num_calls);
                let mut chunks = self.pieces(index, &pieces, &[]);
                chunks.push(self.chunk(index, &json!({}), &[], Some(finish_reason(reason, num_calls))));
                chunks
            }
            EngineEvent::Failed(_) => Vec::new(),
        }
    }

    fn closing(&mut self) -> Vec<Value> {
        self.shape.usage_chunk(CHUNK, self.usage.total()).into_iter().collect()
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
