//! The threads that compile grammars.
//!
//! A submission compiles its grammar once, whatever the number of its answers, and waits for that no longer than its client
//! does. The threads serve clients in turn, and run behind everything else where cores are short, so that a client who
//! compiles much takes nothing from the answers of others.
//!
//! Invariants: a bounded number of grammars waits, clients share their places fairly; a panic costs its own grammar only.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bcg_models::Tokenizer;
use tokio_util::sync::CancellationToken;

use super::fair_threads::{FairThreads, PoolOptions, num_threads};
use super::guide::{Guide, GuideFactory};
use super::{ClientId, FairPlaces, Grammar, SubmitError};

/// Grammars that wait for a thread or are compiled, of all clients together.
pub const COMPILES_MAX: usize = 64;

/// How long a grammar may take to compile, and how long it may wait for that.
pub const COMPILE_TIME_MAX: Duration = Duration::from_secs(30);

/// Compiled grammars that are kept, the latest ones. Most take less than 1 MB; a schema of 500 objects (52 KB) took 13 MB.
const KEPT_MAX: usize = 8;

/// Bytes of the source of a grammar that is kept, at most: large ones are rarely sent twice, and take most memory.
const KEPT_SOURCE_BYTES_MAX: usize = 32 << 10;

/// How often a submission that waits looks whether its client has left.
const TICK: Duration = Duration::from_millis(20);

/// The lowest priority that the kernel gives a thread (its nice value).
const NICE: i32 = 19;

/// Compiles grammars for one model's vocabulary.
#[derive(Debug)]
pub struct Compilers {
    factory: Arc<GuideFactory>,
    threads: FairThreads,
    places: FairPlaces,
    kept: Arc<Kept>,
}

/// The latest grammars, with their sources.
#[derive(Debug, Default)]
struct Kept(Mutex<VecDeque<(String, Guide)>>);

impl Compilers {
    /// Starts the threads. `vocab_size` is the model's, which may exceed the tokenizer's.
    ///
    /// # Errors
    /// An end-of-text token beyond the vocabulary; a thread that cannot be started.
    pub fn start(tokenizer: &Tokenizer, eos: &[u32], vocab_size: usize) -> anyhow::Result<Self> {
        let factory = Arc::new(GuideFactory::new(tokenizer, eos, vocab_size)?);
        let options = PoolOptions {
            name: "bcg-compiler",
            num_threads: num_threads(),
            job_time_max: COMPILE_TIME_MAX,
            begin: stand_back,
        };
        let threads = FairThreads::start(options)?;
        Ok(Self { factory, threads, places: FairPlaces::new(COMPILES_MAX), kept: Arc::default() })
    }

    /// Compiles a grammar into a guide that is at its begin, or copies the one that was kept.
    ///
    /// # Errors
    /// - [`SubmitError::Prompt`]: the grammar is malformed, not supported, or beyond a bound.
    /// - [`SubmitError::CompilersBusy`]: no place, or no thread within [`COMPILE_TIME_MAX`].
    /// - [`SubmitError::Cancelled`], soon after the client has left.
    pub fn guide(
        &self,
        grammar: &Grammar,
        client: &ClientId,
        cancelled: &CancellationToken,
    ) -> Result<Guide, SubmitError> {
        let key = key(grammar);
        if let Some(guide) = key.as_deref().and_then(|key| self.kept.get(key)) {
            return Ok(guide);
        }
        let _place = self.places.try_take(client, 1).ok_or(SubmitError::CompilersBusy)?;
        let (factory, kept, grammar) = (self.factory.clone(), self.kept.clone(), grammar.clone());
        let compile = move || match key {
            Some(key) => {
                kept.get(&key).map_or_else(|| factory.guide(&grammar).inspect(|guide| kept.add(key, guide)), Ok)
            }
            None => factory.guide(&grammar),
        };
        self.wait_for(client, cancelled, compile)
    }

    /// Has a thread compile, and waits for it.
    fn wait_for(
        &self,
        client: &ClientId,
        cancelled: &CancellationToken,
        compile: impl FnOnce() -> Result<Guide, String> + Send + 'static,
    ) -> Result<Guide, SubmitError> {
        let (sender, receiver) = sync_channel(1);
        let has_begun = Arc::new(AtomicBool::new(false));
        let begins = has_begun.clone();
        let job = self.threads.submit(client, move || {
            begins.store(true, Ordering::Relaxed);
            // Nobody waits any more if the client has left.
            let _ = sender.send(compile());
        });
        let (mut since, mut was_begun) = (Instant::now(), false);
        loop {
            match receiver.recv_timeout(TICK) {
                Ok(compiled) => return compiled.map_err(SubmitError::Prompt),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(SubmitError::Prompt("the grammar made the compiler panic; simplify it".into()));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.threads.replace_lost();
            if !was_begun && has_begun.load(Ordering::Relaxed) {
                (since, was_begun) = (Instant::now(), true);
            }
            let is_late = since.elapsed() > COMPILE_TIME_MAX;
            if cancelled.is_cancelled() || is_late {
                self.threads.forget(client, job);
                return Err(match (is_late, was_begun) {
                    (false, _) => SubmitError::Cancelled,
                    (true, true) => too_slow(),
                    (true, false) => SubmitError::CompilersBusy,
                });
            }
        }
    }
}

impl Kept {
    /// Returns a guide that shares nothing with the one that is kept.
    fn get(&self, key: &str) -> Option<Guide> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(kept, _)| kept == key)?;
        let entry = kept.remove(at)?;
        let guide = entry.1.copy();
        kept.push_front(entry);
        Some(guide)
    }

    fn add(&self, key: String, guide: &Guide) {
        let guide = guide.copy();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.iter().all(|(kept, _)| *kept != key) {
            kept.push_front((key, guide));
            kept.truncate(KEPT_MAX);
        }
    }
}

/// Lets everything else run first. Where the kernel refuses that, grammars are compiled all the same.
fn stand_back() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "the threads that compile grammars run with the priority of the others");
    }
}

fn too_slow() -> SubmitError {
    let seconds = COMPILE_TIME_MAX.as_secs();
    SubmitError::Prompt(format!(
        "the format of the answer takes more than {seconds} seconds to compile; simplify it: fewer or smaller patterns, \
         `allOf` and `&`"
    ))
}

/// What tells a grammar from others, in the order of its text; `None` for one that is too large to keep.
fn key(grammar: &Grammar) -> Option<String> {
    let key = match grammar {
        Grammar::JsonObject => "object".to_owned(),
        Grammar::JsonSchema(schema) => format!("schema {schema}"),
        Grammar::Regex(pattern) => format!("regex {pattern}"),
        Grammar::Lark(text) => format!("lark {text}"),
    };
    (key.len() <= KEPT_SOURCE_BYTES_MAX).then_some(key)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn compilers() -> Compilers {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        let tokenizer = Tokenizer::load(&dir).expect("the tiny checkpoint has a tokenizer");
        Compilers::start(&tokenizer, &[2, 0], 512).expect("starts")
    }

    fn compile(compilers: &Compilers, grammar: &Grammar) -> Result<Guide, SubmitError> {
        compilers.guide(grammar, &ClientId::default(), &CancellationToken::new())
    }

    /// Occupies all threads until the sender is dropped.
    fn occupy(compilers: &Compilers) -> std::sync::mpsc::Sender<()> {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let released = Arc::new(Mutex::new(released));
        for _ in 0..num_threads() {
            let released = released.clone();
            compilers.threads.submit(&ClientId::new("other"), move || {
                let _ = released.lock().unwrap_or_else(PoisonError::into_inner).recv();
            });
        }
        release
    }

    #[test]
    fn a_grammar_is_compiled_once_and_each_guide_goes_its_own_way() {
        let compilers = compilers();
        let grammar = Grammar::Regex("[0-9]{2}x".into());
        let mut first = compile(&compilers, &grammar).expect("a pattern");
        let begin = first.mask().expect("a mask");
        let word = begin.iter().position(|&word| word != 0).expect("a digit");
        first.accept(begin[word].trailing_zeros() + 32 * u32::try_from(word).expect("small")).expect("allowed");
        assert_eq!(compilers.kept.0.lock().expect("no panic").len(), 1);
        let _gate = occupy(&compilers);
        let mut second = compile(&compilers, &grammar).expect("it is kept, so no thread is needed");
        assert_eq!(second.mask().expect("a mask"), begin);
    }

    #[test]
    fn properties_in_another_order_are_another_grammar() {
        let schema = |text: &str| Grammar::JsonSchema(serde_json::from_str(text).expect("JSON"));
        let (a, b) = (schema(r#"{"properties": {"a": {}, "b": {}}}"#), schema(r#"{"properties": {"b": {}, "a": {}}}"#));
        assert_ne!(key(&a), key(&b));
    }

    #[test]
    fn no_more_grammars_are_kept_than_may_be() {
        let compilers = compilers();
        for index in 0..KEPT_MAX + 3 {
            compile(&compilers, &Grammar::Regex(format!("a{{{}}}", index + 1))).expect("a pattern");
        }
        let large = json!({"const": "x".repeat(KEPT_SOURCE_BYTES_MAX)});
        compile(&compilers, &Grammar::JsonSchema(large)).expect("a schema");
        let kept = compilers.kept.0.lock().expect("no panic");
        assert_eq!(kept.len(), KEPT_MAX);
        assert_eq!(kept[0].0, "regex a{11}");
    }

    #[test]
    fn a_client_that_leaves_takes_its_grammar_out_of_the_queue() {
        let compilers = compilers();
        let _gate = occupy(&compilers);
        let (client, cancelled) = (ClientId::new("one that leaves"), CancellationToken::new());
        std::thread::scope(|scope| {
            let submission = scope.spawn(|| compilers.guide(&Grammar::JsonObject, &client, &cancelled));
            while compilers.places.taken() == 0 {
                std::thread::yield_now();
            }
            cancelled.cancel();
            let error = submission.join().expect("no panic").expect_err("nobody waits");
            assert_eq!(error, SubmitError::Cancelled);
        });
        assert_eq!(compilers.places.taken(), 0);
    }

    #[test]
    fn a_grammar_without_a_place_is_refused_and_another_client_has_one() {
        let compilers = compilers();
        let greedy = ClientId::new("greedy");
        let places: Vec<_> = std::iter::from_fn(|| compilers.places.try_take(&greedy, 1)).collect();
        assert!(places.len() < COMPILES_MAX);
        let error = compilers.guide(&Grammar::JsonObject, &greedy, &CancellationToken::new()).expect_err("full");
        assert_eq!(error, SubmitError::CompilersBusy);
        compile(&compilers, &Grammar::JsonObject).expect("a place for another client");
    }

    #[test]
    fn what_is_wrong_with_a_grammar_reaches_the_client_and_the_next_one_is_compiled() {
        let compilers = compilers();
        for _ in 0..2 {
            let error = compile(&compilers, &Grammar::Regex("a(".into())).expect_err("malformed");
            assert!(matches!(&error, SubmitError::Prompt(text) if text.contains("refused")), "{error}");
        }
        compile(&compilers, &Grammar::JsonObject).expect("a grammar");
    }
}
