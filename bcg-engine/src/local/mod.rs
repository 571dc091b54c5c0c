//! The engine that runs a model in this process: tokenizes, checks lengths, queues, and hands requests to the worker.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bcg_models::{ChatTemplate, SamplingParams, Tokenizer};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::choice::Choice;
use super::compilers::Compilers;
use super::guide::Guide;
use super::masks::Masks;
use super::metrics::{Metrics, QueueMetrics};
use super::model::StepModel;
use super::output::{Output, OutputOptions};
use super::roles::{RoleName, Roles};
use super::scheduler::Scheduler;
use super::stop::StopStrings;
use super::watchdog::{Watchdog, WatchdogOptions};
use super::worker::{Accepted, EngineEnd, MessageSender, QueuePlaces, Shared};
use super::{
    ClientId, Engine, EventStream, FairPlaces, GenerationRequest, Health, ModelInfo, Place, Prompt, QueueOptions,
    Submission, SubmitError,
};
use thread::{Ready, work, work_in_roles};

/// How long an engine that is dropped waits for its thread to end the step that it is at.
const STOP_WAIT_MAX: Duration = Duration::from_secs(30);

/// How long it waits if the thread is stuck.
const STUCK_WAIT_MAX: Duration = Duration::from_secs(1);

/// Probes that may wait; a single client, which they are, can have up to five places whole.
const PROBES_MAX: usize = 5;

pub use self::siblings::{Replica, Siblings};

mod length;
mod siblings;
mod thread;

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
    /// How much may wait, and how long.
    pub queue: QueueOptions,
    /// How closely it is watched.
    pub watchdog: WatchdogOptions,
    /// Tokens that its prefix cache can hold; 0 if it has none.
    pub prefix_cache_tokens: usize,
    /// How the engine is set up, for [`Engine::server_info`].
    pub settings: Value,
}

/// An engine whose worker thread lives in this process. Dropping it stops the worker and waits for it, but not for ever: a
/// thread that hangs is left behind.
#[derive(Debug)]
pub struct LocalEngine {
    options: LocalOptions,
    eos: Arc<[u32]>,
    worker: MessageSender,
    /// The places in the queue.
    siblings: Siblings,
    /// Probes that wait.
    probes: FairPlaces,
    /// `None` without a tokenizer.
    compilers: Option<Arc<Compilers>>,
    masks: Masks,
    shared: Arc<Shared>,
    /// That of the decode role's worker, in a pair; `shared` is then that of the prefill role's.
    decode: Option<Arc<Shared>>,
    draining: AtomicBool,
    next_seed: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Disconnected once the thread has nothing left to do.
    thread_ended: Mutex<Receiver<()>>,
    /// One for each worker; none if nobody watches. They end before the thread is waited for.
    watchdogs: Vec<Watchdog>,
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
        Self::start_as(None, load)
    }

    /// As [`start`](Self::start), for one of several replicas: what it logs and counts names it.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_replica<M, F>(replica: Replica, load: F) -> anyhow::Result<Self>
    where
        M: StepModel,
        F: FnMut() -> anyhow::Result<(M, Scheduler, LocalOptions)> + Send + 'static,
    {
        Self::start_as(Some(replica), load)
    }

    fn start_as<M, F>(replica: Option<Replica>, load: F) -> anyhow::Result<Self>
    where
        M: StepModel,
        F: FnMut() -> anyhow::Result<(M, Scheduler, LocalOptions)> + Send + 'static,
    {
        let index = replica.as_ref().map(|replica| replica.index);
        let span = index.map_or_else(tracing::Span::none, |index| tracing::error_span!("replica", index));
        let _entered = span.clone().entered();
        let queue = replica.as_ref().map_or_else(QueueMetrics::default, |replica| replica.siblings.metrics.clone());
        let label = index.map(|index| ("replica", index.to_string()));
        let shared = Arc::new(Shared::new(Metrics::new(queue, label)));
        let siblings = replica.map(|replica| replica.siblings);
        Self::start_thread(siblings, (shared.clone(), None), move |ready| {
            let _entered = span.entered();
            work(load, ready, &shared);
        })
    }

    /// As [`start`](Self::start), with prefill apart from decode: each of the two roles has metrics of its own.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_roles<M, F>(load: F) -> anyhow::Result<Self>
    where
        M: StepModel + Send,
        F: FnMut() -> anyhow::Result<(Roles<M>, LocalOptions)> + Send + 'static,
    {
        let queue = QueueMetrics::default();
        let shared = [RoleName::Prefill, RoleName::Decode].map(|role| {
            let label = ("role", role.name().to_owned());
            Arc::new(Shared::new(Metrics::new(queue.clone(), Some(label))))
        });
        let [prefill, decode] = shared.clone();
        Self::start_thread(None, (prefill, Some(decode)), move |ready| work_in_roles(load, ready, &shared))
    }

    fn start_thread(
        siblings: Option<Siblings>,
        (shared, decode): (Arc<Shared>, Option<Arc<Shared>>),
        work: impl FnOnce(&Ready) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (ready, loaded) = sync_channel(1);
        let thread = std::thread::Builder::new().name("bcg-engine".into());
        let (ending, thread_ended) = sync_channel(0);
        let thread = thread.spawn(move || {
            // Dropped last: whoever waits for the thread hears of its end.
            let _ending: SyncSender<()> = ending;
            work(&ready);
        })?;
        let (workers, options) = match loaded.recv() {
            Ok(loaded) => loaded?,
            Err(_) => {
                let _ = thread.join();
                anyhow::bail!("the engine's thread panicked while the model was loaded");
            }
        };
        let siblings = siblings.unwrap_or_else(|| Siblings::new(options.queue));
        let compilers = siblings.compilers(&options)?;
        let Some(worker) = workers.first().cloned() else { anyhow::bail!("the engine has no worker") };
        let watched = std::iter::once(&shared).chain(&decode).zip(options.watchdog.timeout.into_iter().cycle());
        let watch = |(watched, timeout): (&Arc<Shared>, Duration)| {
            let stuck = shared.clone();
            Watchdog::start(watched.pulse.clone(), timeout, move |why| stuck.end_stuck(&why))
        };
        let watchdogs = watched.map(watch).collect::<Result<_, _>>()?;
        Ok(Self {
            eos: Arc::from(options.eos.as_slice()),
            siblings,
            probes: FairPlaces::new(PROBES_MAX),
            compilers,
            masks: Masks::start(move || workers.iter().for_each(MessageSender::wake))?,
            options,
            worker,
            shared,
            decode,
            draining: AtomicBool::new(false),
            next_seed: AtomicU64::new(0),
            thread: Mutex::new(Some(thread)),
            thread_ended: Mutex::new(thread_ended),
            watchdogs,
        })
    }

    /// Resolves when the engine will never serve again, though nobody stopped it, and says how it ended. For one waiter.
    pub async fn given_up(&self) -> EngineEnd {
        self.shared.given_up().await
    }

    /// Returns the engine's metrics; in two roles, those of the prefill role, which has the queue.
    pub fn metrics(&self) -> &Metrics {
        // What waits holds its places, whether or not the worker has seen it yet.
        let metrics = &self.shared.metrics;
        metrics.queue_depth.set(i64::try_from(self.siblings.submissions.taken()).unwrap_or(i64::MAX));
        metrics.queued_answers.set(i64::try_from(self.siblings.answers.taken()).unwrap_or(i64::MAX));
        metrics
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
            Prompt::Text(text) => self.encode(text, true)?,
            Prompt::Chat { messages, tools, template_args } => {
                let tokenizer = self.text()?;
                let Some(chat) = &self.options.chat else {
                    return Err(SubmitError::Prompt(
                        "This model has no chat template; give the prompt as text.".into(),
                    ));
                };
                let rendered =
                    chat.render_for(tokenizer, messages, Some(tools), true, template_args).map_err(refused)?;
                length::refuse_too_long(tokenizer, rendered.text(), self.options.info.context_length)?;
                rendered.encode(tokenizer).map_err(refused)?
            }
            Prompt::Tokens(tokens) => tokens.clone(),
        };
        refuse_unknown(&tokens, self.options.info.vocab_size)?;
        if tokens.is_empty() {
            return Err(SubmitError::Prompt("The prompt is empty; it needs at least one token.".into()));
        }
        Ok(tokens)
    }

    /// Compiles the grammar that a request asks for, once for all its answers.
    fn guide(
        &self,
        request: &GenerationRequest,
        client: &ClientId,
        cancelled: &CancellationToken,
    ) -> Result<Option<Guide>, SubmitError> {
        let Some(grammar) = &request.grammar else { return Ok(None) };
        match &self.compilers {
            Some(compilers) => compilers.guide(grammar, client, cancelled).map(Some),
            None => self.text().map(|_| None),
        }
    }

    /// What is asked of the logits of one answer.
    fn choice(
        &self,
        request: &GenerationRequest,
        guide: Option<&Guide>,
        client: &ClientId,
    ) -> Result<Choice, SubmitError> {
        let biased: Vec<u32> = request.logit_bias.iter().map(|(token, _)| *token).collect();
        refuse_unknown(&biased, self.options.info.vocab_size)?;
        let grammar = guide.map(|guide| self.masks.follow(guide.fork(), client)).transpose();
        let (presence, frequency) = (request.presence_penalty, request.frequency_penalty);
        Ok(Choice::new(&request.logit_bias, presence, frequency, grammar.map_err(SubmitError::Prompt)?))
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

    /// Takes the places in the queue of a submission with this many answers.
    fn places(&self, client: &ClientId, num_answers: usize) -> Result<(Arc<Place>, Place), SubmitError> {
        let QueueOptions { max_queued_requests, max_queued_choices, .. } = self.options.queue;
        if num_answers > max_queued_choices {
            return Err(SubmitError::Prompt(format!(
                "The request asks for {num_answers} answers; no more than {max_queued_choices} may wait \
                 (max_queued_choices). Ask for fewer at once."
            )));
        }
        let full = |max_queued_requests| SubmitError::QueueFull { max_queued_requests };
        let submission = self.siblings.submissions.try_take(client, 1).ok_or_else(|| full(max_queued_requests))?;
        let answers = self.siblings.answers.try_take(client, num_answers).ok_or_else(|| full(max_queued_choices))?;
        Ok((Arc::new(submission), answers))
    }

    /// Prepares all that a submission asks for; what it takes is given back if one part of it is refused.
    fn accept(&self, submission: Submission) -> Result<Vec<EventStream>, SubmitError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(SubmitError::ShuttingDown);
        }
        let Submission { requests, n, client, priority, cancelled } = submission;
        let (submission, mut answers) = self.places(&client, requests.len().saturating_mul(n))?;
        let (mut accepted, mut streams) = (Vec::new(), Vec::new());
        for request in requests {
            let prompt: Arc<[u32]> = self.tokens(&request.prompt)?.into();
            let options = self.output_options(&prompt, &request)?;
            let guide = self.guide(&request, &client, &cancelled)?;
            for index in 0..n as u64 {
                if cancelled.is_cancelled() {
                    return Err(SubmitError::Cancelled);
                }
                let places = QueuePlaces { submission: Some(Arc::clone(&submission)), answer: answers.split(1) };
                let seed = request.seed.map(|seed| seed.wrapping_add(index));
                let choice = self.choice(&request, guide.as_ref(), &client)?;
                let (answer, stream) = self.answer(&prompt, &request, seed, (options.clone(), choice), places)?;
                accepted.push(Accepted { client: client.clone(), priority, ..answer });
                streams.push(stream);
            }
        }
        self.send(accepted).map(|()| streams)
    }

    fn output_options(&self, prompt: &[u32], request: &GenerationRequest) -> Result<OutputOptions, SubmitError> {
        let max_tokens = self.max_tokens(prompt.len(), request.max_tokens)?;
        if !request.stop.is_empty() || request.top_logprobs.is_some() {
            self.text()?;
        }
        Ok(OutputOptions {
            prompt_tokens: prompt.len(),
            max_tokens,
            stop: StopStrings::new(&request.stop).map_err(SubmitError::Prompt)?,
            ends: self.ends(&request.stop_token_ids, request.ignore_eos)?,
            logprobs: request.top_logprobs.is_some(),
        })
    }

    /// Prepares one answer to a request.
    fn answer(
        &self,
        prompt: &Arc<[u32]>,
        request: &GenerationRequest,
        seed: Option<u64>,
        (options, choice): (OutputOptions, Choice),
        places: QueuePlaces,
    ) -> Result<(Accepted, EventStream), SubmitError> {
        let (output, receiver) = Output::new(self.tokenizer(), options);
        let open = self.shared.open.add(output.events(), places);
        let seed = seed.unwrap_or_else(|| fresh_seed(&self.next_seed));
        let accepted = Accepted {
            prompt: Arc::clone(prompt),
            client: ClientId::default(),
            priority: 0,
            is_probe: false,
            sampling: SamplingParams { seed, ..request.sampling },
            choice,
            top_logprobs: request.top_logprobs,
            output,
            open,
            arrived: Instant::now(),
            last_token: None,
        };
        Ok((accepted, EventStream::new(receiver)))
    }

    fn send(&self, accepted: Vec<Accepted>) -> Result<(), SubmitError> {
        match self.shared.send(&self.worker, accepted) {
            true => Ok(()),
            false => Err(SubmitError::Stopped("The engine has stopped; see the server's log.".into())),
        }
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

    fn submit_all(&self, submission: Submission) -> Result<Vec<EventStream>, SubmitError> {
        self.accept(submission).inspect_err(|error| self.shared.metrics.count_refused(error))
    }

    fn has_room(&self, client: &ClientId, num_answers: usize) -> Result<(), SubmitError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(SubmitError::ShuttingDown);
        }
        self.places(client, num_answers).map(drop)
    }

    fn prefix_cache_tokens(&self) -> usize {
        self.options.prefix_cache_tokens
    }

    fn probe(&self) -> Result<EventStream, SubmitError> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(SubmitError::ShuttingDown);
        }
        let prompt: Arc<[u32]> = Arc::from([0]);
        let request = GenerationRequest::greedy(Prompt::Tokens(prompt.to_vec()));
        // Of a pair, the decode role makes the second token.
        let max_tokens = if self.decode.is_some() { 2 } else { 1 };
        let request = GenerationRequest { max_tokens: Some(max_tokens), ignore_eos: true, ..request };
        let client = ClientId::new("probe");
        let full = SubmitError::QueueFull { max_queued_requests: PROBES_MAX };
        let places = QueuePlaces { submission: None, answer: self.probes.try_take(&client, 1).ok_or(full)? };
        let options = self.output_options(&prompt, &request)?;
        let (answer, stream) = self.answer(&prompt, &request, None, (options, Choice::default()), places)?;
        self.send(vec![Accepted { client, is_probe: true, ..answer }])?;
        Ok(stream)
    }

    fn num_steps(&self) -> u64 {
        let workers = std::iter::once(&self.shared).chain(&self.decode);
        workers.map(|shared| shared.num_steps.load(Ordering::Relaxed)).sum()
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, SubmitError> {
        let tokenizer = self.text()?;
        length::refuse_too_long(tokenizer, text, self.options.info.context_length)?;
        let encoded = tokenizer.encode_content(text, add_special_tokens);
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
            "max_queued_requests": self.options.queue.max_queued_requests,
            "max_queued_choices": self.options.queue.max_queued_choices,
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

    fn replica_metrics(&self) -> Vec<&Metrics> {
        std::iter::once(self.metrics()).chain(self.decode.iter().map(|decode| &decode.metrics)).collect()
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
}

impl Drop for LocalEngine {
    fn drop(&mut self) {
        self.watchdogs.clear();
        self.shared.stop.store(true, Ordering::Relaxed);
        self.worker.wake();
        let Some(thread) = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let is_stuck = matches!(self.shared.end(), Some(EngineEnd::Stuck(_)));
        let patience = if is_stuck { STUCK_WAIT_MAX } else { STOP_WAIT_MAX };
        let ended = self.thread_ended.get_mut().unwrap_or_else(PoisonError::into_inner).recv_timeout(patience);
        if ended == Err(RecvTimeoutError::Timeout) {
            tracing::error!(?patience, "the engine's thread does not end: it is left behind, with all that it holds");
        } else {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod constrained;
#[cfg(test)]
mod tests;
