//! `POST /tokenize` and `POST /detokenize`, in the shape that vLLM and SGLang share.

use std::marker::PhantomData;

use axum::Json;
use axum::extract::State;
use bcg_engine::{Engine, Prompt, SubmitError};
use serde::Serialize;

use crate::App;
use crate::chat;
use crate::error::ApiError;
use crate::fields::BodyFields;
use crate::incoming::Incoming;
use crate::json::List;
use crate::prompts::{self, Prompts};
use crate::request::{CHOICES_MAX, check_model};
use crate::tools::Tools;

/// The most tokens of one request, over all its texts or lists; a model whose context is longer may have those.
const TOKENS_MAX: usize = 256 << 10;

/// What belongs to one text, or to each of several.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
enum OneOrAll<T> {
    One(T),
    All(Vec<T>),
}

impl<T: Default> OneOrAll<T> {
    /// A list for a batch, and its only entry otherwise.
    fn new(is_batch: bool, mut items: Vec<T>) -> Self {
        if is_batch { Self::All(items) } else { Self::One(items.pop().unwrap_or_default()) }
    }
}

/// The answer of `/tokenize`.
#[derive(Debug, Serialize)]
pub(crate) struct Encoded {
    max_model_len: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<OneOrAll<Vec<String>>>,
    count: OneOrAll<usize>,
    tokens: OneOrAll<Vec<u32>>,
}

/// Turns a text, several texts or a conversation into tokens.
pub(crate) async fn encode(State(app): State<App>, incoming: Incoming) -> Result<Json<Encoded>, ApiError> {
    app.read(incoming, |app, fields| {
        let (engine, info) = (app.engine.as_ref(), app.engine.info());
        check_model(fields, info)?;
        let add_special = fields.get("add_special_tokens")?.unwrap_or(true);
        let spell = fields.get("return_token_strs")?.unwrap_or(false);
        let Prompts { list, is_batch } = texts(fields)?;
        let (mut tokens, mut total) = (Vec::with_capacity(list.len()), 0);
        for text in list {
            tokens.push(encode_one(engine, text, add_special)?);
            total += tokens.last().map_or(0, Vec::len);
            check_total("prompt", total, info.context_length)?;
        }
        let spelled = |ids: &Vec<u32>| ids.iter().map(|&id| engine.decode(&[id], false)).collect::<Result<Vec<_>, _>>();
        let token_strs = spell.then(|| tokens.iter().map(spelled).collect::<Result<Vec<_>, _>>()).transpose()?;
        Ok(Json(Encoded {
            max_model_len: info.context_length,
            token_strs: token_strs.map(|strs| OneOrAll::new(is_batch, strs)),
            count: OneOrAll::new(is_batch, tokens.iter().map(Vec::len).collect()),
            tokens: OneOrAll::new(is_batch, tokens),
        }))
    })
    .await
}

/// Reads `prompt` or `messages`.
fn texts(fields: &BodyFields) -> Result<Prompts, ApiError> {
    match (prompts::read(fields, "prompt")?, fields.has("messages")) {
        (Some(prompts), false) => Ok(prompts),
        (None, true) => {
            fields.refuse("add_generation_prompt", &[true.into()], "leave it out or set it to true")?;
            Ok(Prompts { list: vec![chat::prompt(fields, &Tools::read(fields)?)?], is_batch: false })
        }
        _ => Err(ApiError::invalid("prompt", "Give either `prompt` or `messages`.")),
    }
}

fn encode_one(engine: &dyn Engine, prompt: Prompt, add_special: bool) -> Result<Vec<u32>, SubmitError> {
    match prompt {
        Prompt::Text(text) => engine.encode(&text, add_special),
        prompt => engine.prompt_tokens(prompt),
    }
}

fn check_total(param: &'static str, total: usize, context_length: usize) -> Result<(), ApiError> {
    let most = TOKENS_MAX.max(context_length);
    if total <= most {
        return Ok(());
    }
    let message = format!("Invalid value for `{param}`: more than {most} tokens in all; send several requests.");
    Err(ApiError::invalid(param, message))
}

/// The answer of `/detokenize`; vLLM calls the text `prompt`, SGLang `text`.
#[derive(Debug, Serialize)]
pub(crate) struct Decoded {
    prompt: OneOrAll<String>,
    text: OneOrAll<String>,
}

/// Turns tokens, or several lists of them, into text.
pub(crate) async fn decode(State(app): State<App>, incoming: Incoming) -> Result<Json<Decoded>, ApiError> {
    const PARAM: &str = "tokens";
    app.read(incoming, |app, fields| {
        let info = app.engine.info();
        check_model(fields, info)?;
        let skip_special = fields.get("skip_special_tokens")?.unwrap_or(true);
        let ids = List { max: TOKENS_MAX.max(info.context_length), entry: PhantomData::<u32> };
        let is_batch = fields.is_list_of_lists(PARAM);
        let lists = if is_batch {
            fields.require(PARAM, List { max: CHOICES_MAX, entry: ids })?
        } else {
            vec![fields.require(PARAM, ids)?]
        };
        check_total(PARAM, lists.iter().map(Vec::len).sum(), info.context_length)?;
        let texts = lists.iter().map(|list| app.engine.decode(list, skip_special)).collect::<Result<Vec<_>, _>>()?;
        let text = OneOrAll::new(is_batch, texts);
        Ok(Json(Decoded { prompt: text.clone(), text }))
    })
    .await
}
