//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bcg_engine::{Delta, EngineEvent, GenerationRequest, ModelInfo, Prompt, TokenLogprob};
use serde_json::{Map, Value, json};

use crate::App;
use crate::answers::{TotalUsage, collect};
use crate::error::ApiError;
use crate::fields::BodyFields;
use crate::incoming::{Asked, Incoming};
use crate::prompts;
use crate::request::{AnswerShape, check_choices, generation, priority, token_count};
use crate::sse::{self, Chunks};

/// The most alternatives per token, as in the OpenAI API.
const LOGPROBS_MAX: usize = 5;
/// Tokens of an answer when the request does not say, as in the OpenAI API.
const MAX_TOKENS_DEFAULT: usize = 16;

/// Bytes of the prompts that stand in front of answers, over all choices of a request.
const ECHO_BYTES_MAX: usize = 8 << 20;

/// What answers and chunks call themselves.
const OBJECT: &str = "text_completion";

/// Continues prompts, at once or in chunks.
pub(crate) async fn create(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    let read = |app: &App, fields: &BodyFields| {
        let shape = AnswerShape::read(fields, app.engine.info(), "cmpl")?;
        let requests = read(fields, app.engine.info(), shape.n)?;
        let logprobs = requests[0].top_logprobs.is_some();
        let echoes = if fields.get("echo")?.unwrap_or(false) {
            echoes(app, &requests, shape.n, logprobs)?
        } else {
            vec![Arc::from(""); requests.len() * shape.n]
        };
        let asked = Asked { requests, n: shape.n, priority: priority(fields)? };
        Ok((asked, (shape, echoes, logprobs)))
    };
    let (answers, (shape, echoes, logprobs)) = app.generate(incoming, read).await?;
    let mut usage = TotalUsage::new(shape.n);
    if shape.stream {
        return Ok(sse::respond(answers, CompletionChunks { shape, logprobs, echoes, usage }));
    }
    let mut choices = Vec::with_capacity(echoes.len());
    for (index, answer) in collect(answers).await?.into_iter().enumerate() {
        usage.add(index, answer.usage);
        let text = [&echoes[index], answer.text.as_str()].concat();
        let logprobs = logprobs.then(|| logprobs_json(&answer.logprobs));
        let ids = shape.token_ids.then_some(answer.tokens.as_slice());
        choices.push(choice(index, &text, ids, logprobs.as_ref(), Some(answer.reason.as_str())));
    }
    Ok(Json(shape.whole(OBJECT, choices, usage.total())).into_response())
}

/// Reads one request for each prompt.
fn read(fields: &BodyFields, info: &ModelInfo, n: usize) -> Result<Vec<GenerationRequest>, ApiError> {
    fields.refuse("suffix", &[json!("")], "this model continues a text but does not fill it in, so leave it out")?;
    let prompts = prompts::read(fields, "prompt")?
        .ok_or_else(|| ApiError::invalid("prompt", "Missing required field `prompt`."))?;
    check_choices("prompt", prompts.list.len(), n)?;
    let top_logprobs = fields.number("logprobs", 0, LOGPROBS_MAX)?;
    let max_tokens = token_count(fields, "max_tokens")?.unwrap_or(MAX_TOKENS_DEFAULT);
    let request = generation(fields, info, Prompt::Tokens(Vec::new()), Some(max_tokens), top_logprobs)?;
    Ok(prompts.list.into_iter().map(|prompt| GenerationRequest { prompt, ..request.clone() }).collect())
}

/// The prompt's text for each choice.
fn echoes(app: &App, requests: &[GenerationRequest], n: usize, logprobs: bool) -> Result<Vec<Arc<str>>, ApiError> {
    if logprobs {
        let message =
            "`echo` does not go with `logprobs`: this server has no log probabilities of prompts; leave one out.";
        return Err(ApiError::invalid("echo", message));
    }
    let mut echoes = Vec::with_capacity(requests.len() * n);
    let mut bytes = 0;
    for request in requests {
        let text: Arc<str> = match &request.prompt {
            Prompt::Text(text) => text.as_str().into(),
            // It will be refused; its text may be far longer than its tokens.
            Prompt::Tokens(tokens) if tokens.len() > app.engine.info().context_length => "".into(),
            prompt => app.engine.decode(&app.engine.prompt_tokens(prompt.clone())?, false)?.into(),
        };
        bytes += text.len() * n;
        if bytes > ECHO_BYTES_MAX {
            let message = format!(
                "`echo` puts the prompt in front of every answer, more than {ECHO_BYTES_MAX} bytes in all; ask for fewer \
                 answers, or leave it out."
            );
            return Err(ApiError::invalid("echo", message));
        }
        echoes.extend(std::iter::repeat_n(text, n));
    }
    Ok(echoes)
}

fn choice(
    index: usize,
    text: &str,
    token_ids: Option<&[u32]>,
    logprobs: Option<&Value>,
    finish_reason: Option<&str>,
) -> Value {
    let mut choice = json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason});
    if let Some(token_ids) = token_ids {
        choice["token_ids"] = json!(token_ids);
    }
    choice
}

struct CompletionChunks {
    shape: AnswerShape,
    logprobs: bool,
    /// For each choice what stands in front of its text.
    echoes: Vec<Arc<str>>,
    usage: TotalUsage,
}

impl CompletionChunks {
    fn chunk(&self, index: usize, delta: &Delta, finish_reason: Option<&str>) -> Value {
        let logprobs = (self.logprobs && !delta.logprobs.is_empty()).then(|| logprobs_json(&delta.logprobs));
        let ids = self.shape.token_ids.then_some(delta.tokens.as_slice());
        self.shape.chunk(OBJECT, &choice(index, &delta.text, ids, logprobs.as_ref(), finish_reason))
    }
}

impl Chunks for CompletionChunks {
    fn opening(&mut self) -> Vec<Value> {
        let echoes = std::mem::take(&mut self.echoes).into_iter().enumerate();
        let echo = |(index, text): (usize, Arc<str>)| {
            self.chunk(index, &Delta { text: text.to_string(), ..Delta::default() }, None)
        };
        echoes.filter(|(_, text)| !text.is_empty()).map(echo).collect()
    }

    fn chunks(&mut self, index: usize, event: EngineEvent) -> Vec<Value> {
        match event {
            EngineEvent::Delta(delta)
                if !self.shape.token_ids && delta.text.is_empty() && delta.logprobs.is_empty() =>
            {
                Vec::new()
            }
            EngineEvent::Delta(delta) => vec![self.chunk(index, &delta, None)],
            EngineEvent::Finished { reason, usage } => {
                self.usage.add(index, usage);
                vec![self.chunk(index, &Delta::default(), Some(reason.as_str()))]
            }
            EngineEvent::Failed(_) => Vec::new(),
        }
    }

    fn closing(&mut self) -> Vec<Value> {
        self.shape.usage_chunk(OBJECT, self.usage.total()).into_iter().collect()
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
