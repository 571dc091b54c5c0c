//! The threads that follow grammars: they take the token that was chosen, and compute which may come next.
//!
//! The engine's thread hands a token over and goes on with others; when the mask is there, it is woken. A sequence without
//! its mask is held out of the plans meanwhile, so a costly grammar makes its own answers slow and no others.
//!
//! Invariants:
//! - the engine's thread never computes a mask, never waits for one, and frees no grammar;
//! - threads serve clients in turn; they are not those that compile, so neither waits for the other;
//! - an answer whose masks take more than their budget, hang or panic fails alone, with a message for its client;
//! - a sequence has one job at most, which bounds what waits.

use std::fmt;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use llguidance::CancellationHandle;
use rustix::time::{ClockId, clock_gettime};

use super::ClientId;
use super::fair_threads::{FairThreads, JobId, PoolOptions, num_threads};
use super::guide::Guide;

/// Processor time that the masks of one answer may take for each token, on average.
pub const MASK_TIME_MAX: Duration = Duration::from_millis(50);

/// Processor time by which they may exceed that for a while.
pub const MASK_BURST: Duration = Duration::from_secs(2);

/// How long one mask may take by the clock, once a thread has begun with it.
pub const MASK_WAIT_MAX: Duration = Duration::from_secs(10);

/// Wait after which a mask may be behind one that hangs.
const LATE: Duration = Duration::from_secs(1);

/// The threads, and whom they wake. Clones share them.
#[derive(Clone)]
pub struct Masks {
    threads: Arc<FairThreads>,
    wake: Arc<dyn Fn() + Send + Sync>,
    wait_max: Duration,
}

impl fmt::Debug for Masks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Masks").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl Masks {
    /// Starts the threads; `wake` is called after each mask.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(wake: impl Fn() + Send + Sync + 'static) -> std::io::Result<Self> {
        Self::with_wait_max(wake, MASK_WAIT_MAX)
    }

    fn with_wait_max(wake: impl Fn() + Send + Sync + 'static, wait_max: Duration) -> std::io::Result<Self> {
        let options =
            PoolOptions { name: "bcg-mask", num_threads: num_threads(), job_time_max: wait_max, begin: || {} };
        Ok(Self { threads: Arc::new(FairThreads::start(options)?), wake: Arc::new(wake), wait_max })
    }

    /// Follows an answer from the begin of its grammar, whose first mask the guide knows since it was compiled.
    ///
    /// # Errors
    /// What the client should know: the grammar cannot go on.
    pub fn follow(&self, mut guide: Guide, client: &ClientId) -> Result<Followed, String> {
        let mask = guide.mask()?;
        let (masks, client, cancellation) = (self.clone(), client.clone(), guide.cancellation());
        Ok(Followed { masks, client, cancellation, mask, guide: Some(guide), job: None, budget: MASK_BURST })
    }

    /// Occupies all threads until the sender is dropped.
    #[cfg(test)]
    pub(crate) fn occupy(&self) -> std::sync::mpsc::Sender<()> {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let released = Arc::new(std::sync::Mutex::new(released));
        for _ in 0..num_threads() {
            let released = released.clone();
            self.threads.submit(&ClientId::new("one that occupies"), move || {
                let _ = released.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv();
            });
        }
        release
    }
}

/// One answer that follows its grammar.
#[derive(Debug)]
pub struct Followed {
    masks: Masks,
    client: ClientId,
    cancellation: CancellationHandle,
    /// What the next token may be, unless there is a job.
    mask: Vec<u32>,
    /// `None` while a thread has it.
    guide: Option<Guide>,
    job: Option<Job>,
    /// Processor time that masks may take from here on.
    budget: Duration,
}

/// A token that a thread takes.
#[derive(Debug)]
struct Job {
    id: JobId,
    submitted: Instant,
    begun: Arc<OnceLock<Instant>>,
    step: Receiver<Step>,
}

/// What a thread made of a token.
#[derive(Debug)]
struct Step {
    guide: Guide,
    mask: Result<Vec<u32>, String>,
    took: Duration,
}

impl Followed {
    /// The tokens that may come next: bit `v % 32` of word `v / 32` stands for token `v`. True while it
    /// [is ready](Self::is_ready).
    pub fn mask(&self) -> &[u32] {
        &self.mask
    }

    /// Hands the token that was chosen to a thread.
    pub fn accept(&mut self, token: u32) {
        self.step(move |guide| guide.accept(token).and_then(|()| guide.mask()));
    }

    fn step(&mut self, step: impl FnOnce(&mut Guide) -> Result<Vec<u32>, String> + Send + 'static) {
        let Some(mut guide) = self.guide.take() else { return };
        let (sender, receiver) = sync_channel(1);
        let begun = Arc::new(OnceLock::new());
        let (begins, wake) = (begun.clone(), Wake(self.masks.wake.clone()));
        let id = self.masks.threads.submit(&self.client, move || {
            let _wake = wake; // also if this panics
            begins.get_or_init(Instant::now);
            let before = processor_time();
            let mask = step(&mut guide);
            let took = processor_time().saturating_sub(before);
            // Nobody listens any more if the answer has ended.
            let _ = sender.send(Step { guide, mask, took });
        });
        self.job = Some(Job { id, submitted: Instant::now(), begun, step: receiver });
    }

    /// Whether the mask of the next token is there. Never waits.
    ///
    /// # Errors
    /// What the client should know: the grammar cannot go on, is too costly, or its computation hangs or panicked.
    pub fn is_ready(&mut self) -> Result<bool, String> {
        let Some(job) = &self.job else { return Ok(true) };
        match job.step.try_recv() {
            Ok(Step { guide, mask, took }) => {
                (self.guide, self.job) = (Some(guide), None);
                self.mask = mask?;
                self.pay(took)?;
                Ok(true)
            }
            Err(TryRecvError::Disconnected) => Err(refusal("made its computation panic")),
            Err(TryRecvError::Empty) => {
                if job.begun.get().is_some_and(|begun| begun.elapsed() > self.masks.wait_max) {
                    self.cancellation.cancel();
                    let seconds = self.masks.wait_max.as_secs();
                    return Err(refusal(&format!("took more than {seconds} seconds for one token")));
                }
                if job.submitted.elapsed() > LATE {
                    self.masks.threads.replace_lost();
                }
                Ok(false)
            }
        }
    }

    fn pay(&mut self, took: Duration) -> Result<(), String> {
        let budget = (self.budget + MASK_TIME_MAX).min(MASK_BURST);
        let milliseconds = MASK_TIME_MAX.as_millis();
        self.budget = budget
            .checked_sub(took)
            .ok_or_else(|| refusal(&format!("took more than {milliseconds} ms of a processor for each token")))?;
        Ok(())
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.cancellation.cancel();
        if let Some(job) = &self.job {
            self.masks.threads.forget(&self.client, job.id);
        }
        // Freeing a large grammar takes 20 ms.
        if let Some(guide) = self.guide.take() {
            self.masks.threads.submit(&self.client, move || drop(guide));
        }
    }
}

/// Wakes when it is dropped.
struct Wake(Arc<dyn Fn() + Send + Sync>);

impl Drop for Wake {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn refusal(what: &str) -> String {
    format!("the format of the answer is refused: its grammar {what}; simplify it")
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc::channel;

    use super::super::Grammar;
    use super::super::guide::GuideFactory;
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn guide() -> Guide {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        let tokenizer = bcg_models::Tokenizer::load(&dir).expect("the tiny checkpoint has a tokenizer");
        let factory = GuideFactory::new(&tokenizer, &[2, 0], 512).expect("a vocabulary");
        factory.guide(&Grammar::Regex("[0-9]*".into())).expect("a pattern")
    }

    /// Masks that are followed, and the wake-ups.
    fn followed(wait_max: Duration) -> (Followed, Receiver<()>) {
        let (woken, wakes) = channel();
        let masks = Masks::with_wait_max(move || woken.send(()).unwrap_or_default(), wait_max).expect("threads");
        (masks.follow(guide(), &ClientId::default()).expect("a first mask"), wakes)
    }

    fn first(mask: &[u32]) -> u32 {
        let word = mask.iter().position(|&word| word != 0).expect("a token is allowed");
        mask[word].trailing_zeros() + 32 * u32::try_from(word).expect("a small mask")
    }

    #[test]
    fn a_mask_comes_from_another_thread_and_is_the_same() {
        let (mut followed, wakes) = followed(LONG);
        let mut guide = guide();
        for _ in 0..20 {
            assert_eq!(followed.mask(), guide.mask().expect("a mask"));
            let token = followed.mask().iter().enumerate().find_map(|(at, &word)| {
                // Not an end-of-text token, which would end it.
                let word = if at == 0 { word & !0b101 } else { word };
                (word != 0).then(|| word.trailing_zeros() + 32 * at as u32)
            });
            let token = token.expect("a digit");
            guide.accept(token).expect("allowed");
            followed.accept(token);
            wakes.recv_timeout(LONG).expect("it wakes");
            assert_eq!(followed.is_ready(), Ok(true));
        }
    }

    #[test]
    fn a_token_that_is_not_allowed_is_an_error_for_the_client() {
        let (mut followed, wakes) = followed(LONG);
        let allowed = followed.mask().to_vec();
        let wrong = (3..512).find(|&token| allowed[token as usize / 32] >> (token % 32) & 1 == 0);
        followed.accept(wrong.expect("not all are digits"));
        wakes.recv_timeout(LONG).expect("it wakes");
        assert!(followed.is_ready().expect_err("not allowed").contains("refused"));
    }

    #[test]
    fn a_computation_that_hangs_fails_its_answer_and_the_next_one_has_a_thread() {
        let (mut hung, _wakes) = followed(Duration::from_millis(20));
        let masks = hung.masks.clone();
        let (release, released) = channel::<()>();
        hung.step(move |guide| {
            let _ = released.recv();
            guide.mask()
        });
        let began = Instant::now();
        let error = loop {
            match hung.is_ready() {
                Ok(is_ready) => assert!(!is_ready && began.elapsed() < LONG, "it hangs"),
                Err(error) => break error,
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(error.contains("seconds for one token"), "{error}");
        let mut next = masks.follow(guide(), &ClientId::default()).expect("a first mask");
        next.accept(first(next.mask()));
        while !next.is_ready().expect("another thread") {
            assert!(began.elapsed() < LONG, "no thread took the place of the one that hangs");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(release);
    }

    #[test]
    fn a_panic_fails_its_answer_and_wakes() {
        let (mut followed, wakes) = followed(LONG);
        followed.step(|_| panic!("on purpose"));
        wakes.recv_timeout(LONG).expect("it wakes");
        while followed.is_ready() == Ok(false) {
            std::thread::yield_now();
        }
        assert!(followed.is_ready().expect_err("it panicked").contains("panic"));
    }

    #[test]
    fn an_answer_may_take_a_burst_and_then_its_share() {
        let (mut followed, _wakes) = followed(LONG);
        followed.pay(MASK_BURST).expect("a burst");
        for _ in 0..100 {
            followed.pay(MASK_TIME_MAX).expect("its share");
        }
        let error = followed.pay(MASK_TIME_MAX + Duration::from_millis(1)).expect_err("too much");
        assert!(error.contains("50 ms of a processor"), "{error}");
        followed.budget = Duration::ZERO;
        for _ in 0..1000 {
            followed.pay(Duration::ZERO).expect("nothing");
        }
        assert_eq!(followed.budget, MASK_BURST);
    }
}
