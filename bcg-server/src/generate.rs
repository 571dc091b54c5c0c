//! `POST /generate`: SGLang's own route, for its clients.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bcg_engine::{EngineEvent, FinishReason, GenerationRequest, Grammar, ModelInfo, Prompt, TokenLogprob};
use serde_json::{Value, json};

use crate::answers::{Answer, collect};
use crate::error::ApiError;
use crate::fields::BodyFields;
use crate::incoming::{Asked, Incoming};
use crate::prompts::{self, Prompts};
use crate::request::{check_choices, generation, next_id, num_answers, priority, token_count};
use crate::sse::{self, Chunks};
use crate::{App, bootstrap};

/// Tokens of an answer when the request does not say, as in SGLang.
const MAX_NEW_TOKENS_DEFAULT: usize = 128;

/// What SGLang can do and this server cannot.
const UNSUPPORTED: &[&str] = &[
    "input_embeds",
    "image_data",
    "audio_data",
    "video_data",
    "lora_path",
    "session_params",
    "token_ids_logprob",
    "custom_logit_processor",
];

/// Continues prompts, at once or in chunks; each chunk has the whole text so far.
pub(crate) async fn create(State(app): State<App>, incoming: Incoming) -> Result<Response, ApiError> {
    let began = Instant::now();
    let read = move |app: &App, fields: &BodyFields| {
        let params = fields.nested("sampling_params")?;
        let stream = fields.get("stream")?.unwrap_or(false);
        let logprobs = logprobs(fields)?;
        let n = num_answers(&params)?;
        let Prompts { list, is_batch } = read_prompts(fields)?;
        check_choices("text", list.len(), n)?;
        let mut requests = read(fields, &params, app.engine.info(), list, logprobs)?;
        let mut shapes = Vec::with_capacity(requests.len() * n);
        for request in &mut requests {
            // Chunks say how long their prompt is, so it is needed as tokens before the engine begins.
            let tokens =
                app.engine.prompt_tokens(std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new())))?;
            shapes.extend((0..n).map(|_| Shape { id: next_id("gen"), prompt_tokens: tokens.len(), logprobs, began }));
            request.prompt = Prompt::Tokens(tokens);
        }
        let asked = Asked { requests, n, priority: priority(fields)? };
        Ok((asked, (shapes, stream, is_batch || n > 1)))
    };
    let (answers, (shapes, stream, is_list)) = app.generate(incoming, read).await?;
    if stream {
        let texts = vec![Answer::default(); shapes.len()];
        return Ok(sse::respond(answers, Cumulative { shapes, texts }));
    }
    let answers = collect(answers).await?;
    let mut whole = shapes.iter().zip(&answers).map(|(shape, answer)| shape.json(answer, Some(answer.reason)));
    let body = if is_list { whole.collect() } else { whole.next().unwrap_or_default() };
    Ok(Json::<Value>(body).into_response())
}

/// Reads `text` or `input_ids`.
fn read_prompts(fields: &BodyFields) -> Result<Prompts, ApiError> {
    match (prompts::read(fields, "text")?, prompts::read(fields, "input_ids")?) {
        (Some(prompts), None) | (None, Some(prompts)) => Ok(prompts),
        _ => Err(ApiError::invalid("text", "Give either `text` or `input_ids`.")),
    }
}

fn read(
    fields: &BodyFields,
    params: &BodyFields,
    info: &ModelInfo,
    prompts: Vec<Prompt>,
    logprobs: bool,
) -> Result<Vec<GenerationRequest>, ApiError> {
    bootstrap::refuse(fields)?;
    for name in UNSUPPORTED {
        fields.refuse(name, &[json!([])], "leave it out")?;
    }
    for name in ["return_hidden_states", "return_routed_experts"] {
        fields.refuse(name, &[json!(false)], "leave it out or set it to false")?;
    }
    for name in ["stop_regex", "ebnf", "structural_tag", "custom_params"] {
        params.refuse(name, &[json!(""), json!([])], "leave it out")?;
    }
    params.refuse("min_new_tokens", &[json!(0)], "leave it out or set it to 0")?;
    params.refuse("skip_special_tokens", &[json!(true)], "leave it out or set it to true")?;
    params.refuse("no_stop_trim", &[json!(false)], "leave it out or set it to false")?;
    let max_tokens = token_count(params, "max_new_tokens")?.unwrap_or(MAX_NEW_TOKENS_DEFAULT);
    let seed = params.get::<i64>("sampling_seed")?.map(i64::cast_unsigned);
    let schema = json_schema(params)?;
    let mut request = generation(params, info, Prompt::Tokens(Vec::new()), Some(max_tokens), logprobs.then_some(0))?;
    request.seed = request.seed.or(seed);
    if schema.is_some() && request.grammar.is_some() {
        let message = "`json_schema` and `regex` exclude each other; give one of them.";
        return Err(ApiError::invalid("json_schema", message));
    }
    request.grammar = request.grammar.or(schema.map(Arc::new));
    Ok(prompts.into_iter().map(|prompt| GenerationRequest { prompt, ..request.clone() }).collect())
}

/// SGLang takes a schema as text.
fn json_schema(params: &BodyFields) -> Result<Option<Grammar>, ApiError> {
    match params.value_in_text("json_schema")? {
        None => Ok(None),
        Some(Some(schema @ Value::Object(_))) => Ok(Some(Grammar::JsonSchema(schema))),
        Some(_) => Err(ApiError::invalid("json_schema", "`json_schema` must be the text of a JSON schema, an object.")),
    }
}

/// Whether log probabilities of the answer are wanted; those of the prompt and of other tokens are refused.
fn logprobs(fields: &BodyFields) -> Result<bool, ApiError> {
    let wanted = fields.get("return_logprob")?.unwrap_or(false);
    if wanted {
        let only_answer = "the prompt has no log probabilities, so leave it out or set it to -1";
        fields.refuse("logprob_start_len", &[json!(-1)], only_answer)?;
        fields.refuse(
            "top_logprobs_num",
            &[json!(0)],
            "leave it out, or use `top_logprobs` of /v1/chat/completions",
        )?;
    }
    Ok(wanted)
}

/// What is known of a choice before it begins.
struct Shape {
    id: String,
    prompt_tokens: usize,
    logprobs: bool,
    began: Instant,
}

impl Shape {
    /// The answer so far, or in full where there is a reason.
    fn json(&self, answer: &Answer, reason: Option<FinishReason>) -> Value {
        let completion_tokens = answer.tokens.len();
        let finish_reason = match reason {
            None => Value::Null,
            Some(FinishReason::Stop) => json!({"type": "stop", "matched": null}),
            Some(FinishReason::Length) => json!({"type": "length", "length": completion_tokens}),
        };
        let mut meta = json!({
            "id": self.id,
            "finish_reason": finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "cached_tokens": answer.usage.cached_tokens,
        });
        if reason.is_some() {
            meta["e2e_latency"] = json!(self.began.elapsed().as_secs_f64());
        }
        if self.logprobs {
            // Tokens that are not shown, such as the last one, have no entry.
            let entry = |(entry, &id): (&TokenLogprob, &u32)| json!([entry.token.logprob, id, entry.token.text]);
            meta["input_token_logprobs"] = json!([]);
            meta["output_token_logprobs"] = answer.logprobs.iter().zip(&answer.tokens).map(entry).collect();
        }
        json!({"text": answer.text, "output_ids": answer.tokens, "meta_info": meta})
    }
}

/// A stream in SGLang's way: every chunk repeats what came before.
struct Cumulative {
    shapes: Vec<Shape>,
    texts: Vec<Answer>,
}

impl Chunks for Cumulative {
    fn opening(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn chunks(&mut self, index: usize, event: EngineEvent) -> Vec<Value> {
        let reason = match &event {
            EngineEvent::Finished { reason, .. } => Some(*reason),
            _ => None,
        };
        let answer = &mut self.texts[index];
        answer.take(event);
        let mut chunk = self.shapes[index].json(answer, reason);
        chunk["index"] = json!(index);
        vec![chunk]
    }

    fn closing(&mut self) -> Vec<Value> {
        Vec::new()
    }
}
