//! The fields that chat and completions share.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::App;
use super::fields::Fields;
use crate::engine::stop::STOP_STRINGS_MAX;
use crate::engine::{GenerationRequest, Prompt, SamplingParams, Usage};
use crate::error::ApiError;

/// How the answer goes out.
#[derive(Debug, Clone)]
pub(super) struct AnswerShape {
    /// `chatcmpl-…` or `cmpl-…`.
    pub(super) id: String,
    /// Unix seconds.
    pub(super) created: u64,
    /// The served model's name.
    pub(super) model: String,
    /// Chunks instead of one answer.
    pub(super) stream: bool,
    /// A last chunk with the usage.
    pub(super) include_usage: bool,
    /// Token ids, because there is no tokenizer to make text of them.
    pub(super) token_ids: bool,
}

impl AnswerShape {
    /// Reads the shape and checks the model's name and the fields that no route supports.
    pub(super) fn read(fields: &Fields, app: &App, prefix: &str) -> Result<Self, ApiError> {
        let info = app.engine.info();
        let served = &info.name;
        if let Some(model) = fields.get::<String>("model")?
            && model != *served
        {
            return Err(ApiError::ModelNotFound(model, served.clone()));
        }
        fields.refuse("n", &[json!(1)], "it makes one answer per request, so leave `n` out or set it to 1")?;
        fields.refuse("best_of", &[json!(1)], "leave it out or set it to 1")?;
        fields.refuse("presence_penalty", &[json!(0)], "leave it out or set it to 0")?;
        fields.refuse("frequency_penalty", &[json!(0)], "leave it out or set it to 0")?;
        fields.refuse("logit_bias", &[json!({})], "leave it out")?;
        let stream = fields.get::<bool>("stream")?.unwrap_or(false);
        let options = fields.get::<Map<String, Value>>("stream_options")?;
        if options.is_some() && !stream {
            return Err(ApiError::invalid("stream_options", "`stream_options` is only allowed when `stream` is true."));
        }
        let include_usage = match options.as_ref().and_then(|options| options.get("include_usage")) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(value)) => *value,
            Some(_) => {
                return Err(ApiError::invalid("stream_options", "`stream_options.include_usage` must be a boolean."));
            }
        };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let token_ids = !info.has_tokenizer;
        Ok(Self { id: next_id(prefix), created, model: served.clone(), stream, include_usage, token_ids })
    }

    /// Starts a JSON object with the fields that every answer and chunk has.
    pub(super) fn object(&self, object: &str) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".into(), json!(self.id));
        map.insert("object".into(), json!(object));
        map.insert("created".into(), json!(self.created));
        map.insert("model".into(), json!(self.model));
        map
    }
}

fn next_id(prefix: &str) -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // RandomState is seeded differently for each call.
    let word = || RandomState::new().build_hasher().finish();
    format!("{prefix}-{:016x}{:016x}", word(), word())
}

/// Reads what both routes ask of the engine. `top_logprobs` is read by the route, because the APIs differ.
pub(super) fn generation(
    fields: &Fields,
    prompt: Prompt,
    max_tokens: Option<usize>,
    top_logprobs: Option<usize>,
) -> Result<GenerationRequest, ApiError> {
    Ok(GenerationRequest {
        prompt,
        sampling: sampling(fields)?,
        seed: seed(fields)?,
        max_tokens,
        stop: stop_strings(fields)?,
        top_logprobs,
        stop_token_ids: Vec::new(),
        logit_bias: Vec::new(),
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        grammar: None,
        ignore_eos: fields.get("ignore_eos")?.unwrap_or(false),
    })
}

/// Reads a token count that must be at least 1.
pub(super) fn token_count(fields: &Fields, name: &'static str) -> Result<Option<usize>, ApiError> {
    fields.number::<usize>(name, 1, u32::MAX as usize)
}

fn sampling(fields: &Fields) -> Result<SamplingParams, ApiError> {
    let default = SamplingParams::default();
    let top_p = fields.number("top_p", 0.0_f32, 1.0)?.unwrap_or(default.top_p);
    let top_k = match fields.number::<i64>("top_k", -1, i64::from(u32::MAX))? {
        // SGLang and vLLM say -1 (or 0) for "all".
        None | Some(-1 | 0) => None,
        Some(top_k) => u32::try_from(top_k).ok(),
    };
    let sampling = SamplingParams {
        temperature: fields.number("temperature", 0.0_f32, 2.0)?.unwrap_or(default.temperature),
        top_k,
        // OpenAI accepts 0, which leaves the most likely token only.
        top_p: if top_p == 0.0 { f32::MIN_POSITIVE } else { top_p },
        min_p: fields.number("min_p", 0.0_f32, 1.0)?.unwrap_or(default.min_p),
        seed: 0,
    };
    sampling.validate().map_err(|error| ApiError::bad_body(error.to_string()))?;
    Ok(sampling)
}

fn seed(fields: &Fields) -> Result<Option<u64>, ApiError> {
    // OpenAI's seeds are signed; the bits are what matters.
    Ok(fields.get::<i64>("seed")?.map(i64::cast_unsigned))
}

fn stop_strings(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let refuse = |what: &str| {
        ApiError::invalid("stop", format!("Invalid value for `stop`: {what}; give a string or up to 4 strings."))
    };
    let stops = match fields.get::<Value>("stop")? {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(stops)) => {
            let strings: Option<Vec<String>> = stops.iter().map(|stop| stop.as_str().map(str::to_owned)).collect();
            strings.ok_or_else(|| refuse("not every entry is a string"))?
        }
        Some(_) => return Err(refuse("it is neither")),
    };
    if stops.len() > STOP_STRINGS_MAX {
        return Err(refuse(&format!("{} entries", stops.len())));
    }
    if stops.iter().any(String::is_empty) {
        return Err(refuse("an empty string would end every answer"));
    }
    Ok(stops)
}

/// Returns the usage in OpenAI's shape.
pub(super) fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Bytes;

    fn fields(value: &Value) -> Fields {
        Fields::parse(Ok(Bytes::from(value.to_string())), 1000).expect("an object")
    }

    #[test]
    fn stop_is_a_string_or_up_to_four() {
        assert_eq!(stop_strings(&fields(&json!({"stop": "a"}))), Ok(vec!["a".to_owned()]));
        assert_eq!(stop_strings(&fields(&json!({"stop": ["a", "b"]}))).map(|stops| stops.len()), Ok(2));
        for bad in [json!(5), json!(["a", 1]), json!(["1", "2", "3", "4", "5"]), json!("")] {
            assert!(stop_strings(&fields(&json!({"stop": bad}))).is_err(), "{bad}");
        }
    }

    #[test]
    fn sampling_fields_have_the_names_that_clients_send() {
        let read = sampling(&fields(&json!({"temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1})));
        let read = read.expect("in range");
        assert_eq!((read.temperature, read.top_p, read.top_k, read.min_p), (0.5, 0.9, Some(4), 0.1));
        assert_eq!(sampling(&fields(&json!({"top_k": -1}))).expect("all").top_k, None);
        assert!(sampling(&fields(&json!({"temperature": -1}))).is_err());
        assert!(sampling(&fields(&json!({"top_p": 0}))).is_ok());
    }

    #[test]
    fn a_negative_seed_is_a_seed() {
        assert_eq!(seed(&fields(&json!({"seed": -1}))), Ok(Some(u64::MAX)));
        assert_eq!(seed(&fields(&json!({}))), Ok(None));
    }
}
