//! Constrained decoding: which tokens a grammar allows next.
//!
//! A [`GuideFactory`] knows the vocabulary as bytes; a [`Guide`] follows one answer. The grammars and the automata are the
//! `llguidance` crate's.
//!
//! Invariants:
//! - a token that a mask allows is accepted, and the mask never allows a token that the tokenizer does not have;
//! - end-of-text tokens are allowed where the answer may end, and only they are once it must;
//! - compiling a grammar and taking a step are bounded (`limits`): a grammar beyond the bounds is an error.
//!
//! Both take their time, so neither happens on the engine's thread: [`super::compilers`] has the threads that compile,
//! [`super::masks`] those that follow.

use std::sync::{Arc, OnceLock};

use bcg_models::Tokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{CancellationHandle, JsonCompileOptions, Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::{Value, json};

use super::{Grammar, intersections};

/// White space between two parts of JSON: a model may indent, but it cannot fill its answer with blanks.
const JSON_SPACE: &str = r" |\n[ \t]{0,32}";

/// Bytes of a pattern, a schema or a grammar at most.
const SOURCE_BYTES_MAX: usize = 256 << 10;

/// Characters of the library's message that a client sees; it may quote the whole grammar.
const REFUSAL_CHARS_MAX: usize = 400;

/// Stack of the thread that compiles: references of a schema may lead through all of it, one call deep for each.
const STACK_BYTES: usize = 512 << 20;

/// Bounds on the work that one grammar may cause.
///
/// Measured in release, on one of two shared cores, with a made-up vocabulary of 128,000 tokens: a schema of a few fields
/// compiles in 1 ms, one of 500 objects in 60 ms, and the costliest of 256 KiB in 2.9 s with twice this fuel. A mask takes some 10 µs,
/// 1 ms where the grammar asks something of the whole vocabulary, and 60 ms in the costliest step that was found.
fn limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 500_000,
        max_lexer_states: 25_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Makes guides for one model's vocabulary.
pub struct GuideFactory {
    tokenizer: Tokenizer,
    eos: Arc<[u32]>,
    vocab_size: usize,
    /// Made at the first use, because it takes longer than a server may take to start.
    parsers: OnceLock<Result<ParserFactory, String>>,
}

impl std::fmt::Debug for GuideFactory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuideFactory").field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

impl GuideFactory {
    /// Remembers the vocabulary; `vocab_size` is the model's, which may exceed the tokenizer's.
    ///
    /// # Errors
    /// An end-of-text token beyond the vocabulary.
    pub fn new(tokenizer: &Tokenizer, eos: &[u32], vocab_size: usize) -> anyhow::Result<Self> {
        if let Some(beyond) = eos.iter().find(|&&id| id as usize >= vocab_size) {
            anyhow::bail!("end-of-text token {beyond} is beyond the vocabulary of {vocab_size} tokens");
        }
        Ok(Self { tokenizer: tokenizer.clone(), eos: Arc::from(eos), vocab_size, parsers: OnceLock::new() })
    }

    /// Compiles a grammar into a guide that is at its begin. May take seconds.
    ///
    /// # Errors
    /// What the client should know: the grammar is malformed, not supported or beyond the bounds.
    pub fn guide(&self, grammar: &Grammar) -> Result<Guide, String> {
        let source = source(grammar)?;
        let parsers = self.parsers.get_or_init(|| self.parsers()).as_ref().map_err(Clone::clone)?;
        let compile = || {
            intersections::check(grammar)?;
            let mut matcher = Matcher::new(parsers.create_parser(source)).into_cancellable();
            // A grammar that allows nothing shows here, and not in the middle of a batch.
            matcher.compute_mask_or_eos().map(|_| matcher).map_err(|error| error.to_string())
        };
        // A thread of its own, so that the memory of a deep stack is given back.
        let matcher = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("bcg-grammar".into()).stack_size(STACK_BYTES);
            let thread = thread.spawn_scoped(scope, compile).map_err(|error| format!("no thread: {error}"))?;
            let compiled = thread.join().map_err(|_| "the grammar made the compiler panic".to_owned())?;
            compiled.map_err(|error| refusal(&error))
        })?;
        Ok(Guide { matcher, eos: self.eos.clone(), vocab_size: self.vocab_size })
    }

    fn parsers(&self) -> Result<ParserFactory, String> {
        let unusable = |error: String| format!("this model's tokenizer cannot constrain answers: {error}");
        let Some(&first_eos) = self.eos.first() else {
            return Err("this model has no end-of-text token, so a constrained answer could not end".into());
        };
        let json = self.tokenizer.to_json().map_err(|error| unusable(error.to_string()))?;
        let mut words = token_bytes_from_tokenizer_json(&json).map_err(|error| unusable(error.to_string()))?;
        // Tokens without bytes are never allowed.
        words.resize(self.vocab_size, Vec::new());
        for &id in self.eos.iter() {
            let word = &mut words[id as usize];
            if word.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER); // it ends the answer, whatever it spells
            }
        }
        let vocab_size = u32::try_from(self.vocab_size).map_err(|error| unusable(error.to_string()))?;
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size, first_eos), &words).with_eos_tokens(&self.eos);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut parsers = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| unusable(error.to_string()))?;
        *parsers.quiet().limits_mut() = limits();
        Ok(parsers)
    }
}

/// One line for the client, without the library's dump of its state.
fn refusal(error: &str) -> String {
    let error: String = error.split("\n<").next().unwrap_or_default().chars().take(REFUSAL_CHARS_MAX).collect();
    format!("the format of the answer is refused: {}; correct or simplify it", error.trim_end())
}

fn source(grammar: &Grammar) -> Result<TopLevelGrammar, String> {
    let bounded = |what: &str, bytes: usize| match bytes {
        ..=SOURCE_BYTES_MAX => Ok(()),
        _ => Err(format!("the {what} has {bytes} bytes; it may have {SOURCE_BYTES_MAX}")),
    };
    match grammar {
        Grammar::JsonObject => Ok(TopLevelGrammar::from_json_schema(json_source(&json!({"type": "object"}))?)),
        Grammar::JsonSchema(schema) => {
            bounded("JSON schema", schema.to_string().len())?;
            Ok(TopLevelGrammar::from_json_schema(json_source(schema)?))
        }
        Grammar::Regex(pattern) => {
            bounded("pattern", pattern.len())?;
            Ok(TopLevelGrammar::from_regex(pattern))
        }
        Grammar::Lark(text) => {
            bounded("grammar", text.len())?;
            Ok(TopLevelGrammar::from_lark(text.clone()))
        }
    }
}

/// Adds to a JSON schema how its JSON is written.
fn json_source(schema: &Value) -> Result<Value, String> {
    let mut schema = schema.clone();
    if !schema.is_object() {
        return Err(format!("a JSON schema is an object, got {schema}"));
    }
    JsonCompileOptions { whitespace_pattern: Some(JSON_SPACE.into()), ..JsonCompileOptions::default() }
        .apply_to(&mut schema);
    Ok(schema)
}

/// Writes a grammar as the right side of a rule in Lark's notation, so that it can be part of a larger one.
///
/// # Errors
/// A schema that is not an object.
pub fn rule(grammar: &Grammar) -> Result<String, String> {
    match grammar {
        Grammar::JsonObject => rule(&Grammar::JsonSchema(json!({"type": "object"}))),
        Grammar::JsonSchema(schema) => Ok(format!("%json {}", json_source(schema)?)),
        Grammar::Regex(pattern) => Ok(format!("/{}/", llguidance::regex_to_lark(pattern, ""))),
        Grammar::Lark(text) => Ok(format!("%lark {{\n{text}\n}}")),
    }
}

/// Follows one answer through its grammar.
pub struct Guide {
    matcher: Matcher,
    eos: Arc<[u32]>,
    vocab_size: usize,
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guide").field("is_finished", &self.is_finished()).finish_non_exhaustive()
    }
}

impl Guide {
    /// Returns a guide for another answer, at the same place. It shares what both learn of the grammar, so one of them
    /// waits while the other computes, and both end if they learn more than the bounds allow.
    pub fn fork(&self) -> Self {
        Self { matcher: self.matcher.clone(), eos: self.eos.clone(), vocab_size: self.vocab_size }
    }

    /// Returns a guide at the same place that shares nothing with this one.
    pub fn copy(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), eos: self.eos.clone(), vocab_size: self.vocab_size }
    }

    /// What ends the computation of this guide from another thread; it is then of no further use.
    pub fn cancellation(&self) -> CancellationHandle {
        self.matcher.cancellation_handle().unwrap_or_default()
    }

    /// Returns the tokens that may come next: bit `v % 32` of word `v / 32` stands for token `v`.
    ///
    /// # Errors
    /// The step is beyond the bounds; the answer cannot go on.
    pub fn mask(&mut self) -> Result<Vec<u32>, String> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| refusal(&error.to_string()))?;
        let mut words = allowed.as_slice().to_vec();
        words.resize(self.vocab_size.div_ceil(32), 0);
        Ok(words)
    }

    /// Takes the token that was chosen.
    ///
    /// # Errors
    /// The grammar does not allow it here, or the step is beyond the bounds; the answer cannot go on.
    pub fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.is_finished() && self.eos.contains(&token) {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|error| refusal(&error.to_string()))
    }

    /// Whether nothing but an end-of-text token may follow.
    pub fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, Instant};

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const EOS: u32 = 2;
    const VOCAB_SIZE: usize = 512;

    fn tokenizer() -> &'static Tokenizer {
        static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
        TOKENIZER.get_or_init(|| {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
            Tokenizer::load(&dir).expect("the tiny checkpoint has a tokenizer")
        })
    }

    fn factory() -> GuideFactory {
        GuideFactory::new(tokenizer(), &[EOS, 0], VOCAB_SIZE).expect("the tokens are in the vocabulary")
    }

    fn allowed(guide: &mut Guide) -> Vec<u32> {
        let mask = guide.mask().expect("a mask");
        assert_eq!(mask.len(), VOCAB_SIZE / 32);
        (0..512_u32).filter(|&id| mask[id as usize / 32] >> (id % 32) & 1 == 1).collect()
    }

    /// Feeds a text token by token; the mask must allow each of them.
    #[track_caller]
    fn feed(guide: &mut Guide, text: &str) {
        for id in tokenizer().encode(text).expect("encodes") {
            assert!(allowed(guide).contains(&id), "token {id} of {text}");
            guide.accept(id).expect("what the mask allows is accepted");
        }
    }

    /// Walks at random along the masks until the answer must end.
    fn wander(guide: &mut Guide, seed: u64) -> String {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut ids = Vec::new();
        while !guide.is_finished() && ids.len() < 2000 {
            let choices = allowed(guide);
            assert!(choices.iter().all(|&id| tokenizer().token(id).is_some()), "{choices:?}");
            let id = choices[random.random_range(0..choices.len())];
            guide.accept(id).expect("what the mask allows is accepted");
            if id == EOS || id == 0 {
                break;
            }
            ids.push(id);
        }
        tokenizer().decode(&ids, false).expect("text")
    }

    #[test]
    fn a_guide_may_move_to_another_thread() {
        fn is_send<T: Send>() {}
        fn is_shared<T: Send + Sync>() {}
        is_send::<Guide>();
        is_shared::<GuideFactory>();
    }

    #[test]
    fn any_way_through_a_schema_is_json_of_that_schema() {
        let schema = json!({
            "type": "object",
            "properties": {"kind": {"enum": ["é", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 120},
                           "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
            "required": ["kind", "count"], "additionalProperties": false,
        });
        let factory = factory();
        for seed in 0..20 {
            let mut guide = factory.guide(&Grammar::JsonSchema(schema.clone())).expect("a schema");
            let text = wander(&mut guide, seed);
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
            assert!(value["count"].as_u64().is_some_and(|count| count <= 120), "{text}");
            assert!(["é", "b"].contains(&value["kind"].as_str().expect("a string")), "{text}");
        }
    }

    #[test]
    fn white_space_cannot_go_on_for_ever() {
        let mut guide = factory().guide(&Grammar::JsonObject).expect("a grammar");
        feed(&mut guide, "{\n  \"a\": 1, \"b\" : [ 2 ]\n}");
        allowed(&mut guide);
        let mut guide = factory().guide(&Grammar::JsonObject).expect("a grammar");
        feed(&mut guide, "{ ");
        let blank = tokenizer().encode(" ").expect("a token");
        assert!(!allowed(&mut guide).contains(&blank[0]));
    }

    #[test]
    fn an_answer_that_is_complete_only_ends() {
        let mut guide = factory().guide(&Grammar::Regex("[0-9]{2}( apples)?".into())).expect("a pattern");
        feed(&mut guide, "4");
        assert!(!allowed(&mut guide).contains(&EOS));
        feed(&mut guide, "2");
        assert!(allowed(&mut guide).contains(&EOS) && !guide.is_finished(), "it may end or go on");
        feed(&mut guide, " apples");
        assert!(guide.is_finished());
        assert_eq!(allowed(&mut guide), [0, EOS]);
        guide.accept(EOS).expect("the end is accepted");
        assert!(guide.is_finished());
    }

    #[test]
    fn a_token_that_is_not_allowed_is_an_error() {
        let mut guide = factory().guide(&Grammar::Regex("ab".into())).expect("a pattern");
        let wrong = tokenizer().encode("z").expect("a token")[0];
        guide.accept(wrong).expect_err("not allowed here");
        guide.mask().expect_err("the answer cannot go on");
    }

    #[test]
    fn what_cannot_be_followed_is_refused_with_its_reason() {
        let factory = factory();
        for (grammar, needle) in [
            (Grammar::Regex("a(".into()), "refused"),
            (Grammar::Regex("a".repeat(SOURCE_BYTES_MAX + 1)), "262144"),
            (Grammar::JsonSchema(json!({"type": "nonsense"})), "nonsense"),
            (Grammar::JsonSchema(json!(true)), "is an object"),
            (Grammar::JsonSchema(json!({"$ref": "#/nowhere"})), "nowhere"),
            (Grammar::JsonSchema(json!({"$ref": "https://example.com/schema.json"})), "example.com"),
            (Grammar::Lark("start: nothing".into()), "nothing"),
        ] {
            let error = factory.guide(&grammar).expect_err("refused");
            assert!(error.contains(needle), "{error}");
            assert!(error.len() < 1000, "{error}");
        }
    }

    /// A schema of definitions that each lead to the next one.
    fn chain(length: usize, link: impl Fn(Value) -> Value) -> Grammar {
        let mut definitions: serde_json::Map<String, Value> = (0..length)
            .map(|index| (format!("a{index}"), link(json!({"$ref": format!("#/$defs/a{}", index + 1)}))))
            .collect();
        definitions.insert(format!("a{length}"), json!({"type": "null"}));
        Grammar::JsonSchema(json!({"$ref": "#/$defs/a0", "$defs": definitions}))
    }

    #[test]
    fn hostile_grammars_end_within_their_bounds() {
        let deep = (0..30).fold(
            json!({"type": "integer"}),
            |deep, _| json!({"type": "array", "items": {"anyOf": [deep, {"type": "string"}]}}),
        );
        let wide: Vec<Value> = (0..3000).map(|index| json!({"const": format!("{index}{}", "x".repeat(50))})).collect();
        let branches: Vec<Value> =
            (0..12).map(|i| json!({"properties": {format!("p{i}"): {"type": "string"}}})).collect();
        let patterns: Vec<Value> = (0..60).map(|i| json!({"pattern": format!("^.*x.{{{i}}}y.*$")})).collect();
        let grammars = [
            chain(7000, |next| next),
            chain(4000, |next| json!({"type": "array", "items": next})),
            chain(4000, |next| json!({"anyOf": [{"type": "string"}, next]})),
            chain(4000, |next| json!({"allOf": [next]})),
            chain(20, |next| json!({"allOf": [next.clone(), next]})),
            Grammar::Regex("(((a{1000}){1000}){1000})".into()),
            Grammar::Regex("(a|aa|aaa|b)*c(.{0,500}d){0,500}".into()),
            Grammar::Regex("(".repeat(20_000) + &")".repeat(20_000)),
            Grammar::JsonSchema(deep),
            Grammar::JsonSchema(json!({"anyOf": wide})),
            Grammar::JsonSchema(json!({"type": "string", "minLength": 100_000, "maxLength": 1_000_000})),
            Grammar::JsonSchema(json!({"type": "array", "minItems": 1_000_000})),
            Grammar::JsonSchema(json!({"allOf": vec![json!({"anyOf": branches}); 6]})),
            Grammar::JsonSchema(json!({"allOf": patterns})),
            Grammar::Lark(format!("start: A\nA: {}\n", vec!["/.*x.{9}y.*/"; 60].join(" & "))),
        ];
        let factory = factory();
        for (index, grammar) in grammars.iter().enumerate() {
            let began = Instant::now();
            let outcome = factory.guide(grammar).and_then(|mut guide| {
                (0..300).try_for_each(|_| {
                    let mask = guide.mask()?;
                    let word = mask.iter().position(|&word| word != 0).expect("a token is allowed");
                    guide.accept(mask[word].trailing_zeros() + 32 * u32::try_from(word).expect("a small mask"))
                })
            });
            assert!(began.elapsed() < Duration::from_secs(30), "grammar {index}: {outcome:?}");
        }
    }

    #[test]
    fn an_end_token_beyond_the_vocabulary_is_refused() {
        let error = GuideFactory::new(tokenizer(), &[512], VOCAB_SIZE).expect_err("beyond").to_string();
        assert!(error.contains("512"), "{error}");
        let none = GuideFactory::new(tokenizer(), &[], VOCAB_SIZE).expect("no end token");
        let error = none.guide(&Grammar::JsonObject).expect_err("could not end");
        assert!(error.contains("end-of-text"), "{error}");
    }
}
