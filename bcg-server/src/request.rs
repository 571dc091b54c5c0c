//! The fields that all generating routes share.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bcg_engine::stop::{STOP_BYTES_MAX, STOP_STRINGS_MAX};
use bcg_engine::{GenerationRequest, ModelInfo, Prompt, SamplingParams, Usage};
use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::{BodyFields, quoted};
use crate::{bootstrap, format};

/// The most answers to one prompt, as in the OpenAI API.
const N_MAX: usize = 128;
/// The most answers of one request, over all its prompts.
pub(crate) const CHOICES_MAX: usize = 1024;
/// The most log probabilities of one request, over all its answers; one answer may always have those of its context.
const LOGPROBS_MAX: usize = 1 << 20;
/// The most tokens with a bias.
const LOGIT_BIAS_MAX: usize = 1024;
/// The most stop tokens of one request.
const STOP_TOKENS_MAX: usize = 128;
/// How far a request may be put before or behind the other waiting requests of its client.
const PRIORITY_MAX: i32 = 1000;

/// How the answer goes out.
#[derive(Debug, Clone)]
pub(crate) struct AnswerShape {
    /// `chatcmpl-…` or `cmpl-…`.
    pub(crate) id: String,
    /// Unix seconds.
    pub(crate) created: u64,
    /// The served model's name.
    pub(crate) model: String,
    /// Answers to each prompt.
    pub(crate) n: usize,
    /// Chunks instead of one answer.
    pub(crate) stream: bool,
    /// A last chunk with the usage.
    pub(crate) include_usage: bool,
    /// Token ids, because there is no tokenizer to make text of them.
    pub(crate) token_ids: bool,
}

impl AnswerShape {
    /// Reads the shape and checks the model's name and the fields that no route supports.
    pub(crate) fn read(fields: &BodyFields, info: &ModelInfo, prefix: &str) -> Result<Self, ApiError> {
        check_model(fields, info)?;
        bootstrap::refuse(fields)?;
        let n = num_answers(fields)?;
        let stream = fields.get::<bool>("stream")?.unwrap_or(false);
        let options = fields.object("stream_options")?;
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
        Ok(Self { id: next_id(prefix), created, model: info.name.clone(), n, stream, include_usage, token_ids })
    }

    /// Starts a JSON object with the fields that every answer and chunk has.
    pub(crate) fn object(&self, object: &str) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".into(), json!(self.id));
        map.insert("object".into(), json!(object));
        map.insert("created".into(), json!(self.created));
        map.insert("model".into(), json!(self.model));
        map
    }

    /// Makes a chunk with one choice.
    pub(crate) fn chunk(&self, object: &str, choice: &Value) -> Value {
        let mut chunk = self.object(object);
        chunk.insert("choices".into(), json!([choice]));
        if self.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        chunk.into()
    }

    /// Makes the last chunk, if one with the usage is wanted.
    pub(crate) fn usage_chunk(&self, object: &str, usage: Usage) -> Option<Value> {
        let mut chunk = self.object(object);
        chunk.insert("choices".into(), json!([]));
        chunk.insert("usage".into(), usage_json(usage));
        self.include_usage.then(|| chunk.into())
    }

    /// Makes the whole answer.
    pub(crate) fn whole(&self, object: &str, choices: Vec<Value>, usage: Usage) -> Value {
        let mut answer = self.object(object);
        answer.insert("choices".into(), choices.into());
        answer.insert("usage".into(), usage_json(usage));
        answer.into()
    }
}

/// Refuses a model that is not served; a request that names none means the one that is.
pub(crate) fn check_model(fields: &BodyFields, info: &ModelInfo) -> Result<(), ApiError> {
    match fields.get::<String>("model")? {
        Some(model) if model != info.name => {
            Err(ApiError::ModelNotFound(quoted(&model).into_owned(), info.name.clone()))
        }
        _ => Ok(()),
    }
}

/// Makes an identity that no other answer has.
pub(crate) fn next_id(prefix: &str) -> String {
    format!("{prefix}-{}", random_hex())
}

/// Makes 32 digits that no other call makes.
pub(crate) fn random_hex() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // RandomState is seeded differently for each call.
    let word = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", word(), word())
}

/// Reads `n`; the engine keeps no answers that it does not return, so `best_of` is the same number.
pub(crate) fn num_answers(fields: &BodyFields) -> Result<usize, ApiError> {
    let n = fields.number("n", 1, N_MAX)?.unwrap_or(1);
    fields.refuse("best_of", &[json!(n)], "every answer is returned, so leave it out or set it to the value of `n`")?;
    Ok(n)
}

/// Refuses a request with more answers than one request may have.
pub(crate) fn check_choices(param: &'static str, prompts: usize, n: usize) -> Result<(), ApiError> {
    if prompts.saturating_mul(n) <= CHOICES_MAX {
        return Ok(());
    }
    let message = format!(
        "Invalid value for `{param}`: {prompts} prompts with n = {n} ask for more than {CHOICES_MAX} answers; send \
         several requests."
    );
    Err(ApiError::invalid(param, message))
}

/// Refuses a request whose answers may hold more log probabilities than one request may have: each takes up to a KiB of
/// memory, far more than its token.
pub(crate) fn check_logprobs(requests: &[GenerationRequest], n: usize, context_length: usize) -> Result<(), ApiError> {
    let tokens = |request: &GenerationRequest| request.max_tokens.unwrap_or(context_length).min(context_length);
    let per_token = |request: &GenerationRequest| request.top_logprobs.map_or(0, |top| top + 1);
    let of_answer = |request: &GenerationRequest| tokens(request) * per_token(request);
    let largest = requests.iter().map(of_answer).max().unwrap_or(0);
    if requests.iter().map(of_answer).sum::<usize>() * n <= LOGPROBS_MAX.max(largest) {
        return Ok(());
    }
    let message = format!(
        "Invalid value for `logprobs`: all answers together may have more than {LOGPROBS_MAX} log probabilities; ask for \
         fewer answers, alternatives or tokens."
    );
    Err(ApiError::invalid("logprobs", message))
}

/// Reads what all routes ask of the engine. `top_logprobs` is read by the route, because the APIs differ.
pub(crate) fn generation(
    fields: &BodyFields,
    info: &ModelInfo,
    prompt: Prompt,
    max_tokens: Option<usize>,
    top_logprobs: Option<usize>,
) -> Result<GenerationRequest, ApiError> {
    fields.refuse(
        "repetition_penalty",
        &[json!(1)],
        "leave it out or set it to 1, and use `presence_penalty` or `frequency_penalty`",
    )?;
    Ok(GenerationRequest {
        prompt,
        sampling: sampling(fields)?,
        seed: seed(fields)?,
        max_tokens,
        stop: stop_strings(fields)?,
        stop_token_ids: stop_token_ids(fields, info)?,
        logit_bias: logit_bias(fields, info)?,
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        grammar: format::grammar(fields)?.map(Arc::new),
        top_logprobs,
        ignore_eos: fields.get("ignore_eos")?.unwrap_or(false),
    })
}

fn known_token(param: &'static str, id: u64, info: &ModelInfo) -> Result<u32, ApiError> {
    let known = usize::try_from(id).is_ok_and(|id| id < info.vocab_size);
    u32::try_from(id).ok().filter(|_| known).ok_or_else(|| {
        let vocab_size = info.vocab_size;
        ApiError::invalid(param, format!("`{param}`: token id {id} is not in the vocabulary of {vocab_size} tokens."))
    })
}

fn stop_token_ids(fields: &BodyFields, info: &ModelInfo) -> Result<Vec<u32>, ApiError> {
    const PARAM: &str = "stop_token_ids";
    let ids = fields.list::<u64>(PARAM, STOP_TOKENS_MAX)?.unwrap_or_default();
    ids.into_iter().map(|id| known_token(PARAM, id, info)).collect()
}

fn logit_bias(fields: &BodyFields, info: &ModelInfo) -> Result<Vec<(u32, f32)>, ApiError> {
    const PARAM: &str = "logit_bias";
    let refuse = |what: &str| {
        let accepted = "give an object from token ids, as strings, to numbers between -100 and 100";
        Err(ApiError::invalid(PARAM, format!("Invalid value for `{PARAM}`: {what}; {accepted}.")))
    };
    let biases = fields.object(PARAM)?.unwrap_or_default();
    if biases.len() > LOGIT_BIAS_MAX {
        return refuse(&format!("{} entries, more than {LOGIT_BIAS_MAX}", biases.len()));
    }
    let mut pairs = Vec::with_capacity(biases.len());
    for (key, value) in &biases {
        // A number has one spelling here, so a token appears once.
        let Some(id) = key.parse::<u64>().ok().filter(|id| id.to_string() == *key) else {
            return refuse("a key is not a token id");
        };
        let Some(bias) = value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias)) else {
            return refuse(&format!("the bias of token {id} is not such a number"));
        };
        #[allow(clippy::cast_possible_truncation)] // a bias needs no more digits
        pairs.push((known_token(PARAM, id, info)?, bias as f32));
    }
    Ok(pairs)
}

/// Reads `priority`, which orders the waiting requests of one client; greater ones run first.
pub(crate) fn priority(fields: &BodyFields) -> Result<i32, ApiError> {
    Ok(fields.number("priority", -PRIORITY_MAX, PRIORITY_MAX)?.unwrap_or(0))
}

/// Reads a token count that must be at least 1.
pub(crate) fn token_count(fields: &BodyFields, name: &'static str) -> Result<Option<usize>, ApiError> {
    fields.number::<usize>(name, 1, u32::MAX as usize)
}

fn sampling(fields: &BodyFields) -> Result<SamplingParams, ApiError> {
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

fn seed(fields: &BodyFields) -> Result<Option<u64>, ApiError> {
    // OpenAI's seeds are signed; the bits are what matters.
    Ok(fields.get::<i64>("seed")?.map(i64::cast_unsigned))
}

fn stop_strings(fields: &BodyFields) -> Result<Vec<String>, ApiError> {
    let accepted = format!("give a string or up to {STOP_STRINGS_MAX} strings, each of at most {STOP_BYTES_MAX} bytes");
    let stops = fields.read("stop", Stops).map_err(|error| {
        let message = error.to_string();
        ApiError::invalid("stop", format!("{}; {accepted}.", message.trim_end_matches('.')))
    })?;
    Ok(stops.unwrap_or_default())
}

/// Reads `stop`: a string or several.
struct Stops;

impl Stops {
    fn check<E: Error>(stop: &str) -> Result<(), E> {
        match stop.len() {
            0 => Err(E::custom("an empty string would end every answer")),
            len if len > STOP_BYTES_MAX => Err(E::custom(format_args!("a string of {len} bytes"))),
            _ => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Stops {
    type Value = Vec<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<String>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Stops {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or an array")
    }

    fn visit_str<E: Error>(self, stop: &str) -> Result<Vec<String>, E> {
        Self::check(stop)?;
        Ok(vec![stop.to_owned()])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<String>, A::Error> {
        let mut stops = Vec::new();
        while let Some(stop) = items.next_element::<String>()? {
            Self::check(&stop)?;
            if stops.len() == STOP_STRINGS_MAX {
                return Err(A::Error::custom(format_args!("more than {STOP_STRINGS_MAX} entries")));
            }
            stops.push(stop);
        }
        Ok(stops)
    }
}

/// Returns the usage in OpenAI's shape.
pub(crate) fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fields::leaked as fields;

    #[test]
    fn stop_is_a_string_or_up_to_four() {
        assert_eq!(stop_strings(&fields(&json!({"stop": "a"}))), Ok(vec!["a".to_owned()]));
        assert_eq!(stop_strings(&fields(&json!({"stop": ["a", "b"]}))).map(|stops| stops.len()), Ok(2));
        let longest = "x".repeat(STOP_BYTES_MAX);
        assert!(stop_strings(&fields(&json!({"stop": vec![longest; 4]}))).is_ok());
        let longer = "x".repeat(STOP_BYTES_MAX + 1);
        for bad in
            [json!(5), json!(["a", 1]), json!(["1", "2", "3", "4", "5"]), json!(""), json!(longer), json!([longer])]
        {
            let error = stop_strings(&fields(&json!({"stop": bad}))).expect_err("refused").to_string();
            assert!(error.contains("up to 4 strings, each of at most 1024 bytes"), "{error}");
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

    fn info() -> ModelInfo {
        ModelInfo { name: "m".into(), created: 0, context_length: 100, vocab_size: 50, has_tokenizer: true }
    }

    #[test]
    fn a_bias_is_for_a_known_token_and_in_range() {
        let read = |bias: Value| logit_bias(&fields(&json!({"logit_bias": bias})), &info());
        assert_eq!(read(json!({"7": -100, "49": 0.5})), Ok(vec![(7, -100.0), (49, 0.5)]));
        for bad in
            [json!({"50": 1}), json!({"07": 1}), json!({"-1": 1}), json!({"a": 1}), json!({"1": 101}), json!([1])]
        {
            let error = read(bad.clone()).expect_err("refused");
            assert!(matches!(error, ApiError::InvalidRequest { param: Some("logit_bias"), .. }), "{bad}");
        }
    }

    #[test]
    fn stop_tokens_are_known() {
        let read = |ids: Value| stop_token_ids(&fields(&json!({"stop_token_ids": ids})), &info());
        assert_eq!(read(json!([3, 49])), Ok(vec![3, 49]));
        for bad in [json!([50]), json!([-1]), json!(3), json!(vec![1; STOP_TOKENS_MAX + 1])] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_answer_is_returned() {
        assert_eq!(num_answers(&fields(&json!({"n": 3, "best_of": 3}))), Ok(3));
        assert_eq!(num_answers(&fields(&json!({}))), Ok(1));
        for bad in [json!({"n": 0}), json!({"n": 129}), json!({"n": 1.5}), json!({"best_of": 2})] {
            assert!(num_answers(&fields(&bad)).is_err(), "{bad}");
        }
        assert_eq!(check_choices("prompt", 8, 128), Ok(()));
        assert!(check_choices("prompt", 9, 128).is_err());
    }

    #[test]
    fn penalties_reach_the_engine_in_their_range() {
        let read = |body: Value| generation(&fields(&body), &info(), Prompt::Text(String::new()), None, None);
        let request = read(json!({"presence_penalty": -2, "frequency_penalty": 0.5})).expect("in range");
        assert_eq!((request.presence_penalty, request.frequency_penalty), (-2.0, 0.5));
        for bad in
            [json!({"presence_penalty": 2.5}), json!({"frequency_penalty": -3}), json!({"repetition_penalty": 1.1})]
        {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
        assert!(read(json!({"repetition_penalty": 1.0, "presence_penalty": null})).is_ok());
    }

    #[test]
    fn log_probabilities_are_bounded_over_all_answers() {
        let greedy = GenerationRequest::greedy(Prompt::Tokens(vec![1]));
        let with = |max_tokens, top_logprobs| GenerationRequest { max_tokens, top_logprobs, ..greedy.clone() };
        let context = 100_000;
        for fine in [with(None, None), with(None, Some(20)), with(Some(8191), Some(0)), with(Some(400), Some(19))] {
            let n = if fine.max_tokens.is_some() { 128 } else { 1 };
            assert_eq!(check_logprobs(&[fine], n, context), Ok(()));
        }
        assert_eq!(check_logprobs(&[with(None, None)], 128, context), Ok(()));
        assert!(check_logprobs(&[with(None, Some(20))], 2, context).is_err());
        assert!(check_logprobs(&vec![with(Some(1024), Some(1)); 513], 1, context).is_err());
    }

    #[test]
    fn a_priority_is_a_small_integer() {
        assert_eq!(priority(&fields(&json!({"priority": -1000}))), Ok(-1000));
        assert_eq!(priority(&fields(&json!({}))), Ok(0));
        for bad in [json!(1001), json!(0.5), json!("high")] {
            assert!(priority(&fields(&json!({ "priority": bad }))).is_err());
        }
    }

    #[test]
    fn a_negative_seed_is_a_seed() {
        assert_eq!(seed(&fields(&json!({"seed": -1}))), Ok(Some(u64::MAX)));
        assert_eq!(seed(&fields(&json!({}))), Ok(None));
    }
}
