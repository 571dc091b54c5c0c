//! An engine that plays a script, so that the protocol can be tested without a model.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bcg_engine::Metrics;
use bcg_engine::{
    ClientId, Delta, Engine, EngineEvent, EventStream, FinishReason, GenerationRequest, Health, ModelInfo, Prompt,
    Submission, SubmitError, Usage,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// What the scripted engine does with the next request.
#[derive(Clone)]
pub(crate) enum Script {
    /// Sends these events.
    Answer(Vec<EngineEvent>),
    /// Sends one piece of text and then nothing until the client leaves.
    Hang,
    /// Sends one piece of text now and the rest after a while.
    Slow(Duration),
    /// Sends more text than any buffer takes, until the client leaves.
    Flood,
    /// Does not accept it.
    Refuse(SubmitError),
}

/// An engine that plays a script.
pub(crate) struct Scripted {
    pub(crate) info: ModelInfo,
    pub(crate) metrics: Metrics,
    pub(crate) scripts: Mutex<Vec<Script>>,
    pub(crate) seen: Mutex<Vec<GenerationRequest>>,
    /// Whose each submission was, and its priority.
    pub(crate) submitted: Mutex<Vec<(ClientId, i32)>>,
    pub(crate) num_steps: AtomicU64,
    pub(crate) cancelled: Arc<AtomicUsize>,
    pub(crate) draining: AtomicBool,
    pub(crate) flushed: AtomicBool,
}

impl Scripted {
    pub(crate) fn new(scripts: Vec<Script>) -> Arc<Self> {
        let name = "scripted".to_owned();
        let info = ModelInfo { name, created: 7, context_length: 100, vocab_size: 50, has_tokenizer: true };
        Arc::new(Self {
            info,
            metrics: Metrics::default(),
            scripts: Mutex::new(scripts.into_iter().rev().collect()),
            seen: Mutex::default(),
            submitted: Mutex::default(),
            num_steps: AtomicU64::new(0),
            cancelled: Arc::default(),
            draining: AtomicBool::new(false),
            flushed: AtomicBool::new(false),
        })
    }

    /// All requests so far, in the order in which they came.
    pub(crate) fn requests(&self) -> Vec<GenerationRequest> {
        self.seen.lock().expect("lock").clone()
    }

    /// Whose each submission was, and its priority, in the order in which they came.
    pub(crate) fn clients(&self) -> Vec<(ClientId, i32)> {
        self.submitted.lock().expect("lock").clone()
    }

    pub(crate) fn last_request(&self) -> GenerationRequest {
        self.seen.lock().expect("lock").last().expect("a request arrived").clone()
    }

    fn accept(&self, request: GenerationRequest) -> Result<EventStream, SubmitError> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(SubmitError::ShuttingDown);
        }
        self.seen.lock().expect("lock").push(request);
        let script = self.scripts.lock().expect("lock").pop().unwrap_or_else(|| Script::Answer(answer(&["ok"])));
        let (sender, receiver) = mpsc::channel(16);
        let cancelled = Arc::clone(&self.cancelled);
        match script {
            Script::Refuse(error) => return Err(error),
            Script::Answer(events) => {
                for event in events {
                    sender.try_send(event).expect("room for the script");
                }
            }
            Script::Hang => {
                sender.try_send(text("first")).expect("room");
                std::thread::spawn(move || {
                    while !sender.is_closed() {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    cancelled.fetch_add(1, Ordering::SeqCst);
                });
            }
            Script::Flood => {
                let piece = "x".repeat(1 << 20);
                std::thread::spawn(move || {
                    while sender.blocking_send(text(&piece)).is_ok() {}
                    cancelled.fetch_add(1, Ordering::SeqCst);
                });
            }
            Script::Slow(pause) => {
                sender.try_send(text("first ")).expect("room");
                std::thread::spawn(move || {
                    std::thread::sleep(pause);
                    for event in answer(&["last"]) {
                        let _ = sender.blocking_send(event);
                    }
                });
            }
        }
        Ok(EventStream::new(receiver))
    }
}

impl Engine for Scripted {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit_all(&self, submission: Submission) -> Result<Vec<EventStream>, SubmitError> {
        let Submission { requests, n, client, priority, .. } = submission;
        self.submitted.lock().expect("lock").push((client, priority));
        let mut streams = Vec::new();
        for mut request in requests {
            if n > 1 {
                request.prompt = Prompt::Tokens(self.prompt_tokens(request.prompt)?);
            }
            for index in 0..n as u64 {
                let seed = request.seed.map(|seed| seed.wrapping_add(index));
                streams.push(self.accept(GenerationRequest { seed, ..request.clone() })?);
            }
        }
        Ok(streams)
    }

    fn probe(&self) -> Result<EventStream, SubmitError> {
        self.accept(GenerationRequest { max_tokens: Some(1), ..GenerationRequest::greedy(Prompt::Tokens(vec![0])) })
    }

    fn num_steps(&self) -> u64 {
        self.num_steps.load(Ordering::SeqCst)
    }

    fn encode(&self, text: &str, _add_special_tokens: bool) -> Result<Vec<u32>, SubmitError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn decode(&self, tokens: &[u32], _skip_special_tokens: bool) -> Result<String, SubmitError> {
        Ok(tokens.iter().filter_map(|&token| char::from_u32(token)).collect())
    }

    fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        match prompt {
            Prompt::Text(text) => self.encode(&text, true),
            Prompt::Tokens(tokens) => Ok(tokens),
            Prompt::Chat { messages, .. } => Ok(vec![1; messages.len()]),
        }
    }

    fn flush_cache(&self) {
        self.flushed.store(true, Ordering::SeqCst);
    }

    fn server_info(&self) -> Value {
        json!({"engine": "scripted", "settings": {"model_path": "somewhere"}})
    }

    fn health(&self) -> Health {
        if self.draining.load(Ordering::SeqCst) { Health::Draining } else { Health::Ready }
    }

    fn replica_metrics(&self) -> Vec<&Metrics> {
        vec![&self.metrics]
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }
}

pub(crate) fn text(text: &str) -> EngineEvent {
    EngineEvent::Delta(Delta { text: text.into(), tokens: vec![1], logprobs: Vec::new() })
}

pub(crate) fn answer(pieces: &[&str]) -> Vec<EngineEvent> {
    let mut events: Vec<EngineEvent> = pieces.iter().map(|piece| text(piece)).collect();
    let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: pieces.len() };
    events.push(EngineEvent::Finished { reason: FinishReason::Stop, usage });
    events
}
