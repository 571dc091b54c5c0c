//! What an engine promises for answers that follow a grammar, with a model that takes the first token it may.

use std::path::Path;
use std::time::Duration;

use bcg_models::state::PagePool;
use bcg_models::{SampledToken, SequenceInput};

use super::super::model::{GraphCounters, StepError};
use super::super::prefix_cache::PrefixCache;
use super::super::scheduler::{Limits, Scheduler};
use super::super::{EngineEvent, FinishReason, Grammar, RequestError};
use super::*;

const CONTEXT: usize = 64;

/// Chooses the last token that the mask allows, and token 7 without a mask.
struct Last;

impl StepModel for Last {
    type Pending = Vec<u32>;

    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<Vec<u32>, StepError> {
        let last = |mask: &[u32]| (0..mask.len() as u32 * 32).rfind(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1);
        Ok(batch.iter().map(|sequence| sequence.token_mask.map_or(Some(7), last).expect("one is allowed")).collect())
    }

    fn collect(&mut self, step: Vec<u32>) -> Result<Vec<SampledToken>, StepError> {
        Ok(step.into_iter().map(|id| SampledToken { id, logprob: None, top: Vec::new(), logits: None }).collect())
    }

    fn stats(&self) -> GraphCounters {
        GraphCounters::default()
    }
}

fn engine() -> LocalEngine {
    let engine = LocalEngine::start(|| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        let name = "last".to_owned();
        let info = ModelInfo { name, created: 0, context_length: CONTEXT, vocab_size: 512, has_tokenizer: true };
        let options = LocalOptions {
            info,
            tokenizer: Some(Tokenizer::load(&dir)?),
            chat: None,
            eos: vec![2],
            queue: QueueOptions::default(),
            watchdog: WatchdogOptions::default(),
            prefix_cache_tokens: 0,
            settings: Value::Null,
        };
        let limits = Limits { max_running_requests: 4, chunked_prefill_size: 64, context_length: CONTEXT };
        Ok((Last, Scheduler::new(limits, PrefixCache::new(PagePool::new(32, 16), true)), options))
    });
    engine.expect("starts")
}

fn request(grammar: Option<Grammar>) -> GenerationRequest {
    let prompt = Prompt::Tokens(vec![5]);
    GenerationRequest { grammar: grammar.map(Arc::new), max_tokens: Some(40), ..GenerationRequest::greedy(prompt) }
}

fn answer(mut events: EventStream) -> Result<(String, FinishReason), RequestError> {
    let mut text = String::new();
    loop {
        match events.next_blocking() {
            Some(EngineEvent::Delta(delta)) => text += &delta.text,
            Some(EngineEvent::Finished { reason, .. }) => return Ok((text, reason)),
            Some(EngineEvent::Failed(error)) => return Err(error),
            None => return Err(RequestError::Engine("no last event".to_owned())),
        }
    }
}

#[test]
fn each_answer_of_a_submission_follows_the_grammar() {
    let engine = engine();
    let requests = vec![request(Some(Grammar::Regex("[0-3]{4}x".into()))), request(None)];
    let streams = engine.submit_all(Submission { requests, n: 5, ..Submission::one(request(None)) }).expect("accepted");
    let answers: Vec<_> = streams.into_iter().map(|stream| answer(stream).expect("an answer")).collect();
    assert_eq!(answers.len(), 10);
    assert!(answers[..5].iter().all(|answer| *answer == ("3333x".to_owned(), FinishReason::Stop)), "{answers:?}");
    assert!(answers[5..].iter().all(|(_, reason)| *reason == FinishReason::Length), "{answers:?}");
}

#[test]
fn an_answer_that_waits_for_its_mask_holds_up_no_other() {
    let engine = engine();
    let release = engine.masks.occupy();
    let constrained = engine.submit(request(Some(Grammar::Regex("[0-3]{4}x".into())))).expect("accepted");
    let (_, reason) = answer(engine.submit(request(None)).expect("accepted")).expect("an answer");
    assert_eq!(reason, FinishReason::Length);
    assert_eq!(engine.metrics().generated_tokens.get(), 41, "the constrained answer has its first token");
    // Nothing runs: the worker sleeps until the mask is there.
    drop(release);
    assert_eq!(answer(constrained), Ok(("3333x".to_owned(), FinishReason::Stop)));
}

#[test]
fn an_answer_whose_client_leaves_while_it_waits_for_its_mask_is_forgotten() {
    let engine = engine();
    let release = engine.masks.occupy();
    let constrained = engine.submit(request(Some(Grammar::Regex("[0-3]{4}x".into())))).expect("accepted");
    while engine.metrics().generated_tokens.get() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(constrained);
    answer(engine.submit(request(None)).expect("accepted")).expect("an answer");
    drop(release);
    answer(engine.submit(request(Some(Grammar::JsonObject))).expect("accepted")).expect("an answer");
}

#[test]
fn a_grammar_that_cannot_go_on_midway_is_refused_and_the_engine_goes_on() {
    let engine = engine();
    // Its first mask is small; the row of the parser after the first token is beyond the bounds.
    let mut definitions: serde_json::Map<String, Value> = (0..1500)
        .map(|i| (format!("a{i}"), json!({"anyOf": [{"type": "string"}, {"$ref": format!("#/$defs/a{}", i + 1)}]})))
        .collect();
    definitions.insert("a1500".to_owned(), json!({"type": "null"}));
    let schema = json!({"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/a0"}, "$defs": definitions});
    let error = answer(engine.submit(request(Some(Grammar::JsonSchema(schema)))).expect("accepted"));
    assert!(matches!(&error, Err(RequestError::Refused(text)) if text.contains("refused")), "{error:?}");
    answer(engine.submit(request(Some(Grammar::JsonObject))).expect("accepted")).expect("an answer");
}
