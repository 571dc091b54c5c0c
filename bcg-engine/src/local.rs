//! The engine that runs a model in this process: tokenizes, checks lengths, queues, and hands requests to the worker.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use bcg_models::{ChatTemplate, SamplingParams, Tokenizer};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::choice::Choice;
use super::guide::GuideFactory;
use super::metrics::Metrics;
use super::model::StepModel;
use super::output::{Output, OutputOptions};
use super::scheduler::Scheduler;
use super::worker::{Accepted, Exit, Requests, Shared, Worker};
use super::{Engine, EventStream, GenerationRequest, Health, ModelInfo, Prompt, SubmitError};

/// What a [`LocalEngine`] knows of its model besides the runner.
#[derive(Debug)]
pub struct LocalOptions {
    /// How clients see the model.
    pub info: ModelInfo,
    /// Text to tokens and back; `None` if there is none, as [`ModelInfo::has_tokenizer`] says.
    pub tokenizer: Option<Tokenizer>,
    /// Conversation to text; `None` if the checkpoint has none.
    pub chat: Option<ChatTemplate>,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// Requests that may wait.
    pub max_queued_requests: usize,
    /// How the engine is set up, for [`Engine::server_info`].
    pub settings: Value,
}

/// An engine whose worker thread lives in this process. Dropping it stops the worker and waits for it.
#[derive(Debug)]
pub struct LocalEngine {
    options: LocalOptions,
    eos: Arc<[u32]>,
    worker: Option<SyncSender<Accepted>>,
    slots: Arc<Semaphore>,
    /// `None` without a tokenizer.
    guides: Option<GuideFactory>,
    shared: Arc<Shared>,
    draining: AtomicBool,
    next_seed: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl LocalEngine {
    /// Starts the worker's thread, makes the model on it with `load`, and waits until it is ready. `load` is called again if
    /// the device is lost.
    ///
    /// # Errors
    /// What `load` returned, or that the thread could not be started.
    pub fn start<M, F>(load: F) -> anyhow::Result<Self>
    where
        M: StepModel,
        F: FnMut() -> anyhow::Result<(M, Scheduler, LocalOptions)> + Send + 'static,
    {
        let shared = Arc::new(Shared::default());
        let (ready, loaded) = sync_channel(1);
        let worker_shared = shared.clone();
        let thread = std::thread::Builder::new().name("bcg-engine".into());
        let thread = thread.spawn(move || work(load, &ready, &worker_shared))?;
        let (worker, options) = match loaded.recv() {
            Ok(loaded) => loaded?,
            Err(_) => {
                let _ = thread.join();
                anyhow::bail!("the engine's thread panicked while the model was loaded");
            }
        };
        let info = &options.info;
        let tokenizer = options.tokenizer.as_ref();
        let guides =
            tokenizer.map(|tokenizer| GuideFactory::new(tokenizer, &options.eos, info.vocab_size)).transpose()?;
        Ok(Self {
            eos: Arc::from(options.eos.as_slice()),
            slots: Arc::new(Semaphore::new(options.max_queued_requests)),
            guides,
            options,
            worker: Some(worker),
            shared,
            draining: AtomicBool::new(false),
            next_seed: AtomicU64::new(0),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Resolves when the engine will never serve again, though nobody stopped it; [`Engine::health`] says why. For one
    /// waiter.
    pub async fn given_up(&self) {
        self.shared.given_up().await;
    }

    /// Returns the model's tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.options.tokenizer.as_ref()
    }

    /// The tokenizer, for something that needs text.
    fn text(&self) -> Result<&Tokenizer, SubmitError> {
        self.tokenizer().ok_or_else(|| {
            SubmitError::Prompt(
                "This model runs without a tokenizer (skip_tokenizer_init): give the prompt as token ids, and leave stop \
                 strings and log probabilities out."
                    .into(),
            )
        })
    }

    fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>, SubmitError> {
        let refused = |error: bcg_models::Error| SubmitError::Prompt(error.to_string());
        let tokens = match prompt {
            Prompt::Text(text) => self.text()?.encode_with(text, true).map_err(refused)?,
            Prompt::Chat { messages, tools, template_args } => {
                let tokenizer = self.text()?;
                let Some(chat) = &self.options.chat else {
                    return Err(SubmitError::Prompt(
                        "This model has no chat template; give the prompt as text.".into(),
                    ));
                };
                let text = chat.render(messages, Some(tools), true, template_args).map_err(refused)?;
                tokenizer.encode(&text).map_err(refused)?
            }
            Prompt::Tokens(tokens) => {
                refuse_unknown(tokens, self.options.info.vocab_size)?;
                tokens.clone()
            }
        };
        if tokens.is_empty() {
            return Err(SubmitError::Prompt("The prompt is empty; it needs at least one token.".into()));
        }
        Ok(tokens)
    }

    /// What is asked of the logits.
    fn choice(&self, request: &GenerationRequest) -> Result<Choice, SubmitError> {
        let biased: Vec<u32> = request.logit_bias.iter().map(|(token, _)| *token).collect();
        refuse_unknown(&biased, self.options.info.vocab_size)?;
        let guide = match (&request.grammar, &self.guides) {
            (Some(grammar), Some(guides)) => Some(guides.guide(grammar).map_err(SubmitError::Prompt)?),
            (Some(_), None) => return self.text().map(|_| Choice::default()),
            (None, _) => None,
        };
        let (presence, frequency) = (request.presence_penalty, request.frequency_penalty);
        Choice::new(&request.logit_bias, presence, frequency, guide).map_err(SubmitError::Prompt)
    }

    /// The tokens that end an answer.
    fn ends(&self, stop_token_ids: &[u32], ignore_eos: bool) -> Result<Arc<[u32]>, SubmitError> {
        refuse_unknown(stop_token_ids, self.options.info.vocab_size)?;
        Ok(match (stop_token_ids, ignore_eos) {
            ([], false) => self.eos.clone(),
            (stops, true) => Arc::from(stops),
            (stops, false) => Arc::from([&self.eos, stops].concat()),
        })
    }

    fn max_tokens(&self, prompt: usize, asked: Option<usize>) -> Result<usize, SubmitError> {
        let context = self.options.info.context_length;
        let max_tokens = asked.unwrap_or_else(|| context.saturating_sub(prompt)).max(1);
        if prompt.saturating_add(max_tokens) > context {
            return Err(SubmitError::ContextLength { prompt, max_tokens, context });
        }
        Ok(max_tokens)
    }
}

fn refuse_unknown(tokens: &[u32], vocab_size: usize) -> Result<(), SubmitError> {
    match tokens.iter().find(|&&token| token as usize >= vocab_size) {
        None => Ok(()),
        Some(unknown) => {
            Err(SubmitError::Prompt(format!("Token id {unknown} is not in the vocabulary of {vocab_size} tokens.")))
        }
    }
}

/// The worker's thread: makes a model and works with it, and once more if its device is lost.
fn work<M, F>(
    mut load: F,
    ready: &SyncSender<anyhow::Result<(SyncSender<Accepted>, LocalOptions)>>,
    shared: &Arc<Shared>,
) where
    M: StepModel,
    F: FnMut() -> anyhow::Result<(M, Scheduler, LocalOptions)>,
{
    let (runner, scheduler, options) = match load() {
        Ok(loaded) => loaded,
        Err(error) => return drop(ready.send(Err(error))),
    };
    // No more requests than queue slots are ever on their way, so sending never waits.
    let (sender, receiver) = sync_channel(options.max_queued_requests);
    if ready.send(Ok((sender, options))).is_err() {
        return;
    }
    let mut requests = Requests::new(receiver);
    let Exit::DeviceLost(error) = Worker::new(runner, scheduler, &mut requests, shared.clone()).run() else { return };
    tracing::error!(error, "the device is lost: loading the model again");
    shared.set_failure(Some(format!("the device is lost ({error}); the model is being loaded again")));
    let error = match load() {
        Ok((runner, scheduler, _)) => {
            tracing::info!("the model is loaded again");
            shared.set_failure(None);
            match Worker::new(runner, scheduler, &mut requests, shared.clone()).run() {
                Exit::Stopped => return,
                Exit::DeviceLost(error) => format!("the device is lost a second time: {error}"),
            }
        }
        Err(error) => format!("the device is lost ({error}), and the model cannot be loaded again: {error:#}"),
    };
    tracing::error!(error, "the engine gives up");
    shared.give_up(error.clone());
    requests.fail_all(&shared.metrics, &error);
}

/// Returns a seed for a request that names none; each call gives another one.
fn fresh_seed(counter: &AtomicU64) -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(counter.fetch_add(1, Ordering::Relaxed));
    hasher.finish()
}

impl Engine for LocalEngine {
    fn info(&self) -> &ModelInfo {
        &self.options.info
    }

    fn submit(&self, request: GenerationRequest) -> Result<EventStream, SubmitError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(SubmitError::ShuttingDown);
        }
        let max_queued_requests = self.options.max_queued_requests;
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            return Err(SubmitError::QueueFull { max_queued_requests });
        };
        let prompt = self.tokens(&request.prompt)?;
        let max_tokens = self.max_tokens(prompt.len(), request.max_tokens)?;
        if !request.stop.is_empty() || request.top_logprobs.is_some() {
            self.text()?;
        }
        let choice = self.choice(&request)?;
        let options = OutputOptions {
            prompt_tokens: prompt.len(),
            max_tokens,
            stop: request.stop,
            ends: self.ends(&request.stop_token_ids, request.ignore_eos)?,
            logprobs: request.top_logprobs.is_some(),
        };
        let (output, receiver) = Output::new(self.tokenizer(), options);
        let seed = request.seed.unwrap_or_else(|| fresh_seed(&self.next_seed));
        let sampling = SamplingParams { seed, ..request.sampling };
        let (top_logprobs, arrived) = (request.top_logprobs, Instant::now());
        let (slot, last_token) = (Some(slot), None);
        let request = Accepted { prompt, sampling, choice, top_logprobs, output, slot, arrived, last_token };
        if self.worker.as_ref().is_some_and(|worker| self.shared.send(worker, request)) {
            return Ok(EventStream::new(receiver));
        }
        Err(SubmitError::Stopped("The engine has stopped; see the server's log.".into()))
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, SubmitError> {
        let encoded = self.text()?.encode_with(text, add_special_tokens);
        encoded.map_err(|error| SubmitError::Prompt(error.to_string()))
    }

    fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, SubmitError> {
        let tokenizer = self.text()?;
        refuse_unknown(tokens, self.options.info.vocab_size)?;
        tokenizer.decode(tokens, skip_special_tokens).map_err(|error| SubmitError::Prompt(error.to_string()))
    }

    fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        self.tokens(&prompt)
    }

    fn flush_cache(&self) {
        self.shared.flush_cache.store(true, Ordering::Relaxed);
    }

    fn server_info(&self) -> Value {
        let info = &self.options.info;
        json!({
            "model": info.name,
            "context_length": info.context_length,
            "vocab_size": info.vocab_size,
            "max_queued_requests": self.options.max_queued_requests,
            "settings": self.options.settings,
        })
    }

    fn health(&self) -> Health {
        let ended =
            self.thread.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_none_or(JoinHandle::is_finished);
        if let Some(error) = self.shared.failure() {
            Health::Failed(error)
        } else if ended {
            Health::Failed("the engine's thread has ended".into())
        } else if self.draining.load(Ordering::Relaxed) {
            Health::Draining
        } else {
            Health::Ready
        }
    }

    fn metrics(&self) -> &Metrics {
        // A request that waits holds a slot, whether or not the worker has seen it yet.
        let waiting = self.options.max_queued_requests - self.slots.available_permits();
        self.shared.metrics.queue_depth.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        &self.shared.metrics
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
}

impl Drop for LocalEngine {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.worker = None;
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use bcg_models::state::PagePool;
    use bcg_models::{SampledToken, SequenceInput};

    use super::super::model::{GraphCounters, StepError};
    use super::super::prefix_cache::PrefixCache;
    use super::super::scheduler::{Limits, Scheduler};
    use super::super::{EngineEvent, FinishReason};
    use super::*;

    /// Counts upwards from the last token; token 100 makes a step fail, 200 makes it panic, 400 loses the device, and 450
    /// does so at the launch.
    struct Counting {
        gate: Option<Arc<Mutex<Receiver<()>>>>,
        chosen: Vec<u32>,
    }

    impl StepModel for Counting {
        type Pending = Vec<u32>;

        fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<Vec<u32>, StepError> {
            let last = |sequence: &SequenceInput<'_>| match sequence.chosen_row {
                Some(row) => self.chosen[row],
                None => sequence.tokens[sequence.tokens.len() - 1],
            };
            self.chosen = batch.iter().map(|sequence| last(sequence) + 1).collect();
            if self.chosen.contains(&451) {
                return Err(StepError { message: "no launch".to_owned(), is_device_lost: true });
            }
            Ok(self.chosen.clone())
        }

        fn collect(&mut self, step: Vec<u32>) -> Result<Vec<SampledToken>, StepError> {
            if let Some(gate) = &self.gate {
                let _ = gate.lock().expect("lock").recv();
            }
            let failed = |message: &str, is_device_lost| StepError { message: message.to_owned(), is_device_lost };
            for &id in &step {
                match id {
                    101 => return Err(failed("out of luck", false)),
                    401 => return Err(failed("device lost", true)),
                    _ => assert_ne!(id, 201, "a bug"),
                }
            }
            Ok(step.into_iter().map(|id| SampledToken { id, logprob: None, top: Vec::new(), logits: None }).collect())
        }

        fn stats(&self) -> GraphCounters {
            GraphCounters::default()
        }
    }

    fn engine(max_queued_requests: usize, gated: bool) -> (LocalEngine, Option<Sender<()>>) {
        engine_with(max_queued_requests, gated, true)
    }

    fn engine_with(max_queued_requests: usize, gated: bool, has_tokenizer: bool) -> (LocalEngine, Option<Sender<()>>) {
        let (open, gate) = channel();
        let gate = gated.then(|| Arc::new(Mutex::new(gate)));
        let engine = LocalEngine::start(move || {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
            let name = "counting".to_owned();
            let info = ModelInfo { name, created: 0, context_length: 64, vocab_size: 461, has_tokenizer };
            let options = LocalOptions {
                info,
                tokenizer: has_tokenizer.then(|| Tokenizer::load(&dir)).transpose()?,
                chat: ChatTemplate::load(&dir)?,
                eos: vec![2],
                max_queued_requests,
                settings: Value::Null,
            };
            let limits = Limits { max_running_requests: 2, chunked_prefill_size: 64, context_length: 64 };
            let scheduler = Scheduler::new(limits, PrefixCache::new(PagePool::new(8, 16), true));
            Ok((Counting { gate: gate.clone(), chosen: Vec::new() }, scheduler, options))
        });
        (engine.expect("starts"), gated.then_some(open))
    }

    fn request(first: u32, max_tokens: usize) -> GenerationRequest {
        let mut request = GenerationRequest::greedy(Prompt::Tokens(vec![first]));
        request.max_tokens = Some(max_tokens);
        request
    }

    fn tokens(mut events: EventStream) -> Result<(Vec<u32>, FinishReason), String> {
        let mut tokens = Vec::new();
        loop {
            match events.next_blocking() {
                Some(EngineEvent::Delta(delta)) => tokens.extend(delta.tokens),
                Some(EngineEvent::Finished { reason, .. }) => return Ok((tokens, reason)),
                Some(EngineEvent::Failed(message)) => return Err(message),
                None => return Err("no last event".to_owned()),
            }
        }
    }

    #[track_caller]
    fn eventually(what: &str, condition: impl Fn() -> bool) {
        for _ in 0..500 {
            if condition() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("never: {what}");
    }

    #[test]
    fn every_request_gets_its_own_answer() {
        let (engine, _) = engine(16, false);
        let streams: Vec<_> = (0..8).map(|at| engine.submit(request(300 + 10 * at, 5)).expect("accepted")).collect();
        for (at, stream) in (0..8).zip(streams) {
            let first = 300 + 10 * at;
            assert_eq!(tokens(stream), Ok(((first + 1..=first + 5).collect(), FinishReason::Length)));
        }
        eventually("all pages are free", || engine.metrics().kv_pages_used.get() == 0);
    }

    #[test]
    fn one_request_too_many_is_refused_and_later_ones_are_not() {
        let (engine, open) = engine(2, true);
        let mut streams = vec![engine.submit(request(300, 2)).expect("accepted")];
        eventually("the first request runs", || engine.slots.available_permits() == 2);
        streams.push(engine.submit(request(310, 2)).expect("waits"));
        streams.push(engine.submit(request(320, 2)).expect("waits"));
        assert_eq!(
            engine.submit(request(330, 2)).expect_err("full"),
            SubmitError::QueueFull { max_queued_requests: 2 }
        );
        drop(open);
        for stream in streams {
            assert!(tokens(stream).is_ok());
        }
        engine.submit(request(330, 2)).expect("there is room again");
    }

    #[test]
    fn a_dropped_stream_frees_its_pages() {
        let (engine, open) = engine(4, true);
        let stream = engine.submit(request(300, 60)).expect("accepted");
        let open = open.expect("gated");
        open.send(()).expect("the worker lives");
        eventually("the request holds pages", || engine.metrics().kv_pages_used.get() > 0);
        drop(stream);
        open.send(()).expect("the worker lives");
        eventually("its pages are free", || engine.metrics().kv_pages_used.get() == 0);
    }

    #[test]
    fn a_failed_step_fails_its_requests_and_the_engine_goes_on() {
        let (engine, _) = engine(4, false);
        for (bad, message) in [(98, "out of luck"), (198, "a bug")] {
            let error = tokens(engine.submit(request(bad, 10)).expect("accepted")).expect_err("fails");
            assert!(error.contains(message), "{error}");
            assert!(tokens(engine.submit(request(300, 3)).expect("accepted")).is_ok());
            assert_eq!(engine.health(), Health::Ready);
        }
    }

    #[test]
    fn a_lost_device_fails_what_runs_and_keeps_what_waits() {
        let (engine, open) = engine(4, true);
        let running: Vec<_> = [398, 300].map(|first| engine.submit(request(first, 10)).expect("accepted")).into();
        let open = open.expect("gated");
        open.send(()).expect("the worker lives");
        eventually("two run", || engine.slots.available_permits() == 4);
        let waiting = engine.submit(request(310, 2)).expect("waits");
        drop(open);
        for stream in running {
            let error = tokens(stream).expect_err("was under way");
            assert!(error.contains("device lost"), "{error}");
        }
        assert_eq!(tokens(waiting), Ok((vec![311, 312], FinishReason::Length)));
        assert_eq!(engine.health(), Health::Ready);
    }

    #[test]
    fn a_device_that_is_lost_at_a_launch_is_named_to_those_of_the_step_before() {
        let (engine, open) = engine(4, true);
        let first = engine.submit(request(447, 10)).expect("accepted");
        eventually("it runs", || engine.slots.available_permits() == 4);
        let last_in_the_step_before = engine.submit(request(300, 1)).expect("accepted");
        drop(open);
        let error = tokens(first).expect_err("its step could not be launched");
        assert!(error.contains("step of this request failed: no launch"), "{error}");
        let error = tokens(last_in_the_step_before).expect_err("was under way");
        assert!(error.contains("the device was lost while it worked on this request: no launch"), "{error}");
    }

    #[test]
    fn a_device_that_is_lost_twice_ends_the_engine() {
        let (engine, _) = engine(4, false);
        for message in ["device lost", "device lost"] {
            let error = tokens(engine.submit(request(399, 10)).expect("accepted")).expect_err("fails");
            assert!(error.contains(message), "{error}");
        }
        let given_up = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        given_up.block_on(engine.given_up());
        assert!(matches!(engine.health(), Health::Failed(error) if error.contains("a second time")));
        eventually("it takes nothing any more", || engine.submit(request(300, 1)).is_err());
    }

    #[test]
    fn steps_that_always_fail_count_as_a_lost_device() {
        let (engine, _) = engine(4, false);
        let failed = (0..6).map(|_| tokens(engine.submit(request(100, 10)).expect("accepted")).is_err());
        assert_eq!(failed.filter(|failed| *failed).count(), 6);
        eventually("it gives up", || matches!(engine.health(), Health::Failed(_)));
    }

    #[test]
    fn a_draining_engine_finishes_and_takes_nothing_new() {
        let (engine, open) = engine(4, true);
        let stream = engine.submit(request(300, 3)).expect("accepted");
        engine.drain();
        assert_eq!(engine.submit(request(300, 3)).expect_err("draining"), SubmitError::ShuttingDown);
        assert_eq!(engine.health(), Health::Draining);
        drop(open);
        assert!(tokens(stream).is_ok());
    }

    #[test]
    fn an_engine_that_is_dropped_ends_its_streams_and_its_thread() {
        let (engine, open) = engine(4, true);
        let mut streams = vec![engine.submit(request(300, 50)).expect("accepted")];
        eventually("the first request runs", || engine.slots.available_permits() == 4);
        streams.extend([310, 320].map(|first| engine.submit(request(first, 50)).expect("accepted")));
        let shared = engine.shared.clone();
        let (sender, ended) = channel();
        let dropping = std::thread::spawn(move || drop(engine));
        // The gate is still shut: no answer can be complete when the engine goes.
        eventually("the engine goes", || shared.stop.load(Ordering::Relaxed));
        drop(open);
        for stream in streams {
            let sender = sender.clone();
            std::thread::spawn(move || sender.send(tokens(stream)));
        }
        for _ in 0..3 {
            let end = ended.recv_timeout(Duration::from_secs(10)).expect("every stream ends in time");
            let error = end.expect_err("no answer was complete");
            assert!(error.contains("before the answer was complete"), "{error}");
        }
        eventually("the drop returns", || dropping.is_finished());
        dropping.join().expect("the drop does not panic");
        assert_eq!(Arc::strong_count(&shared), 1, "the engine's thread, which holds another, was joined");
    }

    #[test]
    fn lengths_and_unknown_tokens_are_checked_before_queueing() {
        let (engine, _) = engine(4, false);
        assert_eq!(
            engine.submit(request(300, 64)).expect_err("one too many"),
            SubmitError::ContextLength { prompt: 1, max_tokens: 64, context: 64 }
        );
        assert!(matches!(engine.submit(request(461, 1)), Err(SubmitError::Prompt(_))));
        let empty = GenerationRequest::greedy(Prompt::Tokens(Vec::new()));
        assert!(matches!(engine.submit(empty), Err(SubmitError::Prompt(_))));
        assert_eq!(engine.slots.available_permits(), 4);
    }

    #[test]
    fn without_a_tokenizer_ids_are_answered_with_ids_and_text_is_refused() {
        let (engine, _) = engine_with(4, false, false);
        let stream = engine.submit(request(300, 3)).expect("accepted");
        assert_eq!(tokens(stream), Ok((vec![301, 302, 303], FinishReason::Length)));
        let text = GenerationRequest::greedy(Prompt::Text("3+4".into()));
        let chat = GenerationRequest::greedy(Prompt::chat(Vec::new()));
        let stop = GenerationRequest { stop: vec!["x".into()], ..request(300, 3) };
        let logprobs = GenerationRequest { top_logprobs: Some(0), ..request(300, 3) };
        for refused in [text, chat, stop, logprobs] {
            let error = engine.submit(refused).expect_err("needs text").to_string();
            assert!(error.contains("skip_tokenizer_init"), "{error}");
        }
    }

    #[test]
    fn a_failed_load_is_reported() {
        let failed = LocalEngine::start::<Counting, _>(|| anyhow::bail!("no weights"));
        assert!(failed.expect_err("fails").to_string().contains("no weights"));
    }
}
