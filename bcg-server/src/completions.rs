//! `POST /v1/completions`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use bcg_engine::{Delta, EngineEvent, GenerationRequest, ModelInfo, Prompt, TokenLogprob};
use serde_json::{Map, Value, json};

use crate::App;
use crate::answers::{TotalUsage, collect};
use crate::error::ApiError;
use crate::fields::BodyFields;
use crate::request::{AnswerShape, check_choices, generation, token_count};
use crate::sse::{self, Chunks};

/// The most alternatives per token, as in the OpenAI API.
const LOGPROBS_MAX: usize = 5;
/// Tokens of an answer when the request does not say, as in the OpenAI API.
const MAX_TOKENS_DEFAULT: usize = 16;

/// What answers and chunks call themselves.
const OBJECT: &str = "text_completion";

/// Continues prompts, at once or in chunks.
pub(crate) async fn create(State(app): State<App>, body: Result<Bytes, BytesRejection>) -> Result<Response, ApiError> {
    let fields = BodyFields::parse(body, app.max_body_bytes)?;
    let shape = AnswerShape::read(&fields, &app, "cmpl")?;
    let requests = read(&fields, app.engine.info())?;
    check_choices("prompt", requests.len(), shape.n)?;
    let (logprobs, num_choices) = (requests[0].top_logprobs.is_some(), requests.len() * shape.n);
    let mut echoes = if fields.get("echo")?.unwrap_or(false) {
        echoes(&app, &requests, shape.n, logprobs).await?
    } else {
        vec![String::new(); num_choices]
    };
    let answers = app.submit(requests, shape.n).await?;
    let mut usage = TotalUsage::new(shape.n);
    if shape.stream {
        return Ok(sse::respond(answers, CompletionChunks { shape, logprobs, echoes, usage }));
    }
    let mut choices = Vec::with_capacity(num_choices);
    for (index, answer) in collect(answers).await?.into_iter().enumerate() {
        usage.add(index, answer.usage);
        let text = std::mem::take(&mut echoes[index]) + &answer.text;
        let logprobs = logprobs.then(|| logprobs_json(&answer.logprobs));
        let ids = shape.token_ids.then_some(answer.tokens.as_slice());
        choices.push(choice(index, &text, ids, logprobs.as_ref(), Some(answer.reason.as_str())));
    }
    Ok(Json(shape.whole(OBJECT, choices, usage.total())).into_response())
}

/// Reads one request for each prompt.
fn read(fields: &BodyFields, info: &ModelInfo) -> Result<Vec<GenerationRequest>, ApiError> {
    fields.refuse("suffix", &[json!("")], "this model continues a text but does not fill it in, so leave it out")?;
    let prompts = prompts("prompt", fields.require("prompt")?)?;
    let top_logprobs = fields.number("logprobs", 0, LOGPROBS_MAX)?;
    let max_tokens = token_count(fields, "max_tokens")?.unwrap_or(MAX_TOKENS_DEFAULT);
    let read = |prompt| generation(fields, info, prompt, Some(max_tokens), top_logprobs);
    prompts.into_iter().map(read).collect()
}

/// Reads a prompt or several, each as text or token ids.
pub(crate) fn prompts(param: &'static str, value: Value) -> Result<Vec<Prompt>, ApiError> {
    let refuse = |what: &str| {
        let accepted = "give a string, an array of strings, token ids, or an array of arrays of token ids";
        ApiError::invalid(param, format!("Invalid value for `{param}`: {what}; {accepted}."))
    };
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => match items.first() {
            None => Err(refuse("the array is empty")),
            Some(Value::Number(_)) => match token_ids(&items) {
                Some(ids) => Ok(vec![Prompt::Tokens(ids)]),
                None => Err(refuse("token ids are integers from 0")),
            },
            Some(_) => {
                let prompt = |item| match item {
                    Value::String(text) => Ok(Prompt::Text(text)),
                    Value::Array(ids) => {
                        token_ids(&ids).map(Prompt::Tokens).ok_or_else(|| refuse("an entry is no prompt"))
                    }
                    _ => Err(refuse("an entry is no prompt")),
                };
                items.into_iter().map(prompt).collect()
            }
        },
        _ => Err(refuse("it is neither a string nor an array")),
    }
}

fn token_ids(items: &[Value]) -> Option<Vec<u32>> {
    items.iter().map(|item| item.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

/// The prompt's text for each choice.
async fn echoes(app: &App, requests: &[GenerationRequest], n: usize, logprobs: bool) -> Result<Vec<String>, ApiError> {
    if logprobs {
        let message =
            "`echo` does not go with `logprobs`: this server has no log probabilities of prompts; leave one out.";
        return Err(ApiError::invalid("echo", message));
    }
    let prompts: Vec<Prompt> = requests.iter().map(|request| request.prompt.clone()).collect();
    app.with_engine(move |engine| {
        let mut texts = Vec::with_capacity(prompts.len() * n);
        for prompt in prompts {
            let text = match prompt {
                Prompt::Text(text) => text,
                prompt => engine.decode(&engine.prompt_tokens(prompt)?, false)?,
            };
            texts.extend(std::iter::repeat_n(text, n));
        }
        Ok(texts)
    })
    .await
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
    echoes: Vec<String>,
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
        let echo = |(index, text): (usize, String)| self.chunk(index, &Delta { text, ..Delta::default() }, None);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_text_or_tokens() {
        let (a, b) = (Prompt::Text("a".into()), Prompt::Tokens(vec![1, 2]));
        for (value, expected) in [
            (json!("a"), vec![&a]),
            (json!([1, 2]), vec![&b]),
            (json!(["a"]), vec![&a]),
            (json!([[1, 2], [1, 2]]), vec![&b, &b]),
            (json!(["a", [1, 2]]), vec![&a, &b]),
        ] {
            assert_eq!(prompts("prompt", value).expect("prompts").iter().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn other_prompts_are_refused_by_name() {
        for bad in
            [json!([]), json!([1, -2]), json!(7), json!([1, "a"]), json!(["a", 1]), json!([[1.5]]), json!([[[1]]])]
        {
            let error = prompts("prompt", bad.clone()).expect_err("refused");
            assert!(matches!(error, ApiError::InvalidRequest { param: Some("prompt"), .. }), "{bad}");
        }
    }
}
