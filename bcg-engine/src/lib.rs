//! The engine: takes requests for text, batches them, runs the model and hands out tokens.
//!
//! [`Engine`] takes a [`GenerationRequest`] and answers with an [`EventStream`]; nothing above it (HTTP, the command line)
//! knows of pages, batches or graphs, and nothing in it knows of HTTP or flags. [`local`] is the engine that runs a model in
//! this process, [`load::start`] makes one from [`EngineOptions`]; tests put a scripted engine in its place.
//!
//! [`replicas`] puts several engines behind one front door.
//!
//! [`roles`] puts a model that prefills and one that decodes behind one front door.
//!
//! Reading order: [`scheduler`] decides what runs next, [`sequence`] is what it moves around, [`prefix_cache`] holds its
//! pages, [`output`] turns tokens into text, [`worker`] is the thread that ties them to a [`model::StepModel`]. Beside it,
//! [`compilers`] and [`masks`] are the threads of grammars.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use bcg_models::chat::{Content, ContentPart};
pub use bcg_models::{ChatMessage, FinishReason, OptionError, Progress, SamplingParams, Stage};

pub use self::fair_places::{FairPlaces, Place};
pub use self::metrics::Metrics;
pub use self::options::{CaptureMode, DeviceChoice, EngineOptions, QueueOptions};
pub use self::replicas::Replicas;
use self::replicas::Ticket;
pub use self::watchdog::WatchdogOptions;
pub use self::worker::EngineEnd;

pub mod choice;
pub mod compilers;
pub mod fair_places;
mod fair_threads;
pub mod guide;
mod intersections;
pub mod load;
pub mod local;
pub mod masks;
pub mod metrics;
pub mod model;
mod options;
pub mod output;
pub mod prefix_cache;
pub mod replicas;
pub mod roles;
pub mod scheduler;
pub mod sequence;
pub mod stop;
pub mod watchdog;
pub mod worker;

/// What a client may know about the served model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// Name in the API.
    pub name: String,
    /// Unix seconds at which the model was loaded.
    pub created: u64,
    /// Tokens of prompt and answer together at most.
    pub context_length: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Whether it reads and writes text; without a tokenizer, prompts and answers are token ids.
    pub has_tokenizer: bool,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Plain text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A conversation, put through the model's chat template.
    Chat {
        /// What was said.
        messages: Vec<ChatMessage>,
        /// The functions that the model may call, as the template reads them: an array, or null for none.
        tools: Value,
        /// Further values that the template may read, such as `enable_thinking`.
        template_args: Map<String, Value>,
    },
}

/// One request for text.
#[derive(Debug, Clone)]
pub struct GenerationRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// How tokens are chosen; its seed is not used.
    pub sampling: SamplingParams,
    /// Seeds the random choices; `None` takes another seed for each request.
    pub seed: Option<u64>,
    /// Tokens to generate at most; `None` goes to the end of the context.
    pub max_tokens: Option<usize>,
    /// Strings that end the answer; no part of one is returned.
    pub stop: Vec<String>,
    /// Tokens that end the answer, beside the model's end-of-text tokens.
    pub stop_token_ids: Vec<u32>,
    /// What is added to the logits of these tokens at each step; a token appears once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Subtracted from the logits of tokens that the answer holds already.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens once for each time that the answer holds them.
    pub frequency_penalty: f32,
    /// What the answer must look like; `None` leaves it free.
    pub grammar: Option<Arc<Grammar>>,
    /// Log probabilities: `None` for none, else how many alternatives per token.
    pub top_logprobs: Option<usize>,
    /// Go on past the model's end-of-text tokens.
    pub ignore_eos: bool,
}

/// Whose request it is. Clients share the queue, the batch and the compilers of grammars fairly; an engine knows nothing
/// else of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(Arc<str>);

impl ClientId {
    /// Names a client; equal names are the same client.
    pub fn new(name: &str) -> Self {
        Self(Arc::from(name))
    }
}

impl Default for ClientId {
    /// The one client of an engine that is not shared.
    fn default() -> Self {
        Self::new("")
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What one client asks for at once: one or several prompts, each with `n` answers. It takes one place in the queue, and
/// is accepted or refused as a whole.
#[derive(Debug, Clone)]
pub struct Submission {
    /// One request for each prompt, at least one.
    pub requests: Vec<GenerationRequest>,
    /// Answers to each prompt, at least 1; answer `i` of a request with a seed has the seed `seed + i`.
    pub n: usize,
    /// Whose it is.
    pub client: ClientId,
    /// Orders the waiting requests of one client: greater ones run first, equal ones as they came.
    pub priority: i32,
    /// Ends the work of submitting once the client has left. Afterwards, dropping the event streams does.
    pub cancelled: CancellationToken,
}

impl Submission {
    /// One answer to one request, of the default client.
    pub fn one(request: GenerationRequest) -> Self {
        Self {
            requests: vec![request],
            n: 1,
            client: ClientId::default(),
            priority: 0,
            cancelled: CancellationToken::new(),
        }
    }
}

/// What a constrained answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema allows.
    JsonSchema(Value),
    /// Text that a regular expression matches.
    Regex(String),
    /// A context-free grammar in Lark's notation.
    Lark(String),
}

impl Prompt {
    /// A conversation without functions to call and further template values.
    pub fn chat(messages: Vec<ChatMessage>) -> Self {
        Self::Chat { messages, tools: Value::Null, template_args: Map::new() }
    }
}

impl GenerationRequest {
    /// A request with greedy sampling and no limits of its own.
    pub fn greedy(prompt: Prompt) -> Self {
        Self {
            prompt,
            sampling: SamplingParams::greedy(),
            seed: None,
            max_tokens: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            logit_bias: Vec::new(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            grammar: None,
            top_logprobs: None,
            ignore_eos: false,
        }
    }
}

/// A token, as text, with its log probability.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenText {
    /// The token's text; bytes that are no UTF-8 on their own are replaced.
    pub text: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// A generated token with its alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The chosen token.
    pub token: TokenText,
    /// The most probable tokens, best first.
    pub top: Vec<TokenText>,
    /// Characters of answer before this token.
    pub text_offset: usize,
}

/// A piece of the answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Text to append; may be empty while text is held back.
    pub text: String,
    /// Tokens sampled since the last piece, whether or not their text is shown yet.
    pub tokens: Vec<u32>,
    /// Log probabilities of the tokens whose text has been shown.
    pub logprobs: Vec<TokenLogprob>,
}

/// Tokens read and written for one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt that the prefix cache held.
    pub cached_tokens: usize,
    /// Tokens generated, the end-of-text token included.
    pub completion_tokens: usize,
}

/// What an engine reports about one request, in order; `Finished` or `Failed` comes last.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineEvent {
    /// More of the answer.
    Delta(Delta),
    /// The answer is complete.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
    /// The request failed; the engine goes on.
    Failed(RequestError),
}

/// Why an accepted request has no complete answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It asks for something that cannot be done, which showed only while it ran.
    #[error("{0}")]
    Refused(String),
    /// It waited too long for its turn.
    #[error("the request waited {seconds} seconds in the queue; try again later")]
    QueueTimeout {
        /// The limit in seconds.
        seconds: u64,
    },
    /// The engine failed while it worked on it.
    #[error("{0}")]
    Engine(String),
}

/// The events of one request. Dropping it cancels the request.
#[derive(Debug)]
pub struct EventStream {
    receiver: mpsc::Receiver<EngineEvent>,
    done: bool,
    /// What a router of replicas counts for this answer, until it ends.
    ticket: Option<Ticket>,
}

impl EventStream {
    /// Wraps the receiving end of an engine's channel.
    pub fn new(receiver: mpsc::Receiver<EngineEvent>) -> Self {
        Self { receiver, done: false, ticket: None }
    }

    /// Holds a ticket until the answer ends or nobody waits for it any more.
    pub(crate) fn holding(mut self, ticket: Option<Ticket>) -> Self {
        self.ticket = ticket;
        self
    }

    /// Waits for the next event; `None` after the last one.
    ///
    /// An engine that goes away without a last event reads as [`EngineEvent::Failed`], so no caller waits for ever.
    pub async fn next(&mut self) -> Option<EngineEvent> {
        if self.done {
            return None;
        }
        let event = self.receiver.recv().await;
        Some(self.note(event))
    }

    /// [`EventStream::next`] for threads outside an async runtime.
    pub fn next_blocking(&mut self) -> Option<EngineEvent> {
        if self.done {
            return None;
        }
        let event = self.receiver.blocking_recv();
        Some(self.note(event))
    }

    fn note(&mut self, event: Option<EngineEvent>) -> EngineEvent {
        let stopped = || RequestError::Engine("the engine stopped before the answer was complete".into());
        let event = event.unwrap_or_else(|| EngineEvent::Failed(stopped()));
        self.done = !matches!(event, EngineEvent::Delta(_));
        match &mut self.ticket {
            _ if self.done => self.ticket = None,
            Some(ticket) => ticket.begin(),
            None => {}
        }
        event
    }
}

/// Why a request was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full: the most requests that may wait do so already.
    #[error("the queue of {max_queued_requests} requests is full")]
    QueueFull {
        /// Requests that may wait.
        max_queued_requests: usize,
    },
    /// The compilers of grammars have as much to do as they may have.
    #[error("the queue of grammars to compile is full")]
    CompilersBusy,
    /// The client left while its request was submitted.
    #[error("the client left")]
    Cancelled,
    /// The engine finishes what it has and takes nothing new.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// Prompt and answer do not fit.
    #[error(
        "This model's maximum context length is {context} tokens. However, you requested {} tokens ({prompt} in the \
         prompt, {max_tokens} in the completion). Please reduce the length of the prompt or of the completion.",
        prompt + max_tokens
    )]
    ContextLength {
        /// Tokens in the prompt.
        prompt: usize,
        /// Tokens asked for, at least 1.
        max_tokens: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// The text of the prompt is so long that it was not even turned into tokens as a whole.
    #[error(
        "This model's maximum context length is {context} tokens. However, your prompt alone has more. Please reduce the \
         length of the prompt."
    )]
    PromptTooLong {
        /// Tokens that fit.
        context: usize,
    },
    /// The prompt cannot be used: empty, unknown token ids, refused by the chat template.
    #[error("{0}")]
    Prompt(String),
    /// The engine's thread has ended.
    #[error("{0}")]
    Stopped(String),
}

/// Whether an engine can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It serves.
    Ready,
    /// It finishes what it has and takes nothing new.
    Draining,
    /// It serves, but some of its replicas cannot: which, and why.
    Degraded(String),
    /// It cannot serve, and why.
    Failed(String),
}

/// Generates text. The only thing that HTTP and the command line know of the layers below.
pub trait Engine: Send + Sync + 'static {
    /// Describes the served model.
    fn info(&self) -> &ModelInfo;

    /// Accepts what a client asks for, or says why not: an event stream for each answer, prompt by prompt. May tokenize
    /// and compile, so call it off the async threads.
    ///
    /// # Errors
    /// [`SubmitError`]; a refused submission has used nothing.
    fn submit_all(&self, submission: Submission) -> Result<Vec<EventStream>, SubmitError>;

    /// Accepts one request of the default client, with one answer.
    ///
    /// # Errors
    /// As [`submit_all`](Self::submit_all).
    fn submit(&self, request: GenerationRequest) -> Result<EventStream, SubmitError> {
        let mut streams = self.submit_all(Submission::one(request))?;
        streams.pop().ok_or_else(|| SubmitError::Stopped("the engine returned no events".into()))
    }

    /// Whether a submission of this client with this many answers would find a place in the queue now. It takes none, so the
    /// answer can be out of date at once: it only spares the work on what would be refused.
    ///
    /// # Errors
    /// As [`submit_all`](Self::submit_all), for a place that is not there.
    fn has_room(&self, _client: &ClientId, _num_answers: usize) -> Result<(), SubmitError> {
        Ok(())
    }

    /// Returns how many tokens its prefix cache can hold; 0 for an engine that has none.
    fn prefix_cache_tokens(&self) -> usize {
        0
    }

    /// Returns the engines that it hands requests to, in order, each of which can be asked alone; none for an engine that
    /// does the work itself.
    fn replicas(&self) -> Vec<&dyn Engine> {
        Vec::new()
    }

    /// Asks for one token, to learn whether the engine works. It takes no place in the queue.
    ///
    /// # Errors
    /// [`SubmitError::ShuttingDown`], [`SubmitError::Stopped`].
    fn probe(&self) -> Result<EventStream, SubmitError>;

    /// Returns how many steps were finished since the engine started. While it grows, the engine works.
    fn num_steps(&self) -> u64;

    /// Turns text into tokens, with the special tokens that the tokenizer puts around a text if `add_special_tokens`.
    ///
    /// # Errors
    /// [`SubmitError::PromptTooLong`] for text that is far longer than the context; [`SubmitError::Prompt`] without a tokenizer, or for text that it refuses.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, SubmitError>;

    /// Turns tokens into text, without special tokens if `skip_special_tokens`.
    ///
    /// # Errors
    /// [`SubmitError::Prompt`] without a tokenizer, or for a token that it does not know.
    fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, SubmitError>;

    /// Turns a prompt into tokens, as [`submit`](Self::submit) does.
    ///
    /// # Errors
    /// [`SubmitError::PromptTooLong`], [`SubmitError::Prompt`].
    fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError>;

    /// Drops what the prefix cache holds and no running request uses, before the next step.
    fn flush_cache(&self);

    /// Describes how the engine is set up and what it holds, for operators: a JSON object.
    fn server_info(&self) -> Value;

    /// Says whether the engine can serve.
    fn health(&self) -> Health;

    /// Returns the metrics of each replica, in order, for [`Metrics::encode_all`]; an engine that does the work itself has
    /// one. The HTTP layer adds its own to them.
    fn replica_metrics(&self) -> Vec<&Metrics>;

    /// Takes nothing new from now on; what runs goes on.
    fn drain(&self);
}
