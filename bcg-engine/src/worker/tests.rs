//! What the worker's thread promises to those that send it requests.

use bcg_models::state::PagePool;
use serde_json::Value;

use super::*;
use crate::local::{LocalEngine, LocalOptions};
use crate::metrics::ReasonLabel;
use crate::prefix_cache::PrefixCache;
use crate::scheduler::Limits;
use crate::{Engine, GenerationRequest, ModelInfo, Prompt, QueueOptions, SubmitError, WatchdogOptions};

/// Loses its device at every step.
struct Lost;

impl StepModel for Lost {
    type Pending = ();

    fn launch(&mut self, _: &[SequenceInput<'_>]) -> Result<(), StepError> {
        Err(StepError { message: "device lost".into(), damage: Damage::Model })
    }

    fn collect(&mut self, (): ()) -> Result<Vec<SampledToken>, StepError> {
        Ok(Vec::new())
    }

    fn stats(&self) -> GraphCounters {
        GraphCounters::default()
    }
}

fn engine() -> LocalEngine {
    let engine = LocalEngine::start(|| {
        let (name, has_tokenizer) = ("lost".to_owned(), false);
        let info = ModelInfo { name, created: 0, context_length: 16, vocab_size: 8, has_tokenizer };
        let queue = QueueOptions { max_queued_requests: 64, ..QueueOptions::default() };
        let options = LocalOptions {
            info,
            tokenizer: None,
            chat: None,
            eos: vec![2],
            queue,
            watchdog: WatchdogOptions::default(),
            prefix_cache_tokens: 0,
            settings: Value::Null,
        };
        let limits = Limits { max_running_requests: 2, chunked_prefill_size: 16, context_length: 16 };
        Ok((Lost, Scheduler::new(limits, PrefixCache::new(PagePool::new(4, 16), true)), options))
    });
    engine.expect("starts")
}

#[test]
fn wake_ups_that_nobody_has_seen_count_as_one() {
    let (sender, receiver) = channel();
    for _ in 0..2 {
        (0..3).for_each(|_| sender.wake());
        assert!(matches!(receiver.recv(IDLE_TICK), Ok(Message::Wake)));
        assert!(matches!(receiver.try_recv(), Err(TryRecvError::Empty)));
    }
}

#[test]
fn requests_that_come_while_the_engine_gives_up_end_too() {
    for _ in 0..200 {
        let engine = engine();
        let submit = || {
            let mut accepted = 0;
            loop {
                match engine.submit(GenerationRequest::greedy(Prompt::Tokens(vec![1]))) {
                    Ok(_) => accepted += 1,
                    Err(SubmitError::QueueFull { .. }) => std::thread::yield_now(),
                    Err(_) => return accepted,
                }
            }
        };
        let accepted: u64 = std::thread::scope(|scope| {
            let threads = [(); 4].map(|()| scope.spawn(submit));
            threads.map(|thread| thread.join().expect("no panic")).iter().sum()
        });
        let count = |reason| engine.metrics().finished.get_or_create(&ReasonLabel { reason }).get();
        let ended = || count("failed") + count("cancelled");
        // The thread may still be telling those that wait.
        let deadline = Instant::now() + Duration::from_secs(10);
        while ended() < accepted && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(ended(), accepted);
    }
}
