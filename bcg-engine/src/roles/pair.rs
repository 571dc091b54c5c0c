//! Both workers of a pair: they run together, and end together.

use std::panic::resume_unwind;
use std::sync::Arc;

use bcg_models::state::PagePool;

use super::super::model::StepModel;
use super::super::prefix_cache::PrefixCache;
use super::super::scheduler::{Limits, Scheduler};
use super::super::worker::{Exit, MessageReceiver, MessageSender, Requests, Shared, Worker, channel};
use super::partner::PairEnd;
use super::{DecodeRoom, MovedBytes, Partner, RoleName};

/// What one role runs.
#[derive(Debug)]
struct OneRole<M> {
    model: M,
    scheduler: Scheduler,
}

/// What both roles run.
#[derive(Debug)]
pub struct Roles<M> {
    prefill: OneRole<M>,
    decode: OneRole<M>,
    room: DecodeRoom,
    bytes: MovedBytes,
}

impl<M: StepModel + Send> Roles<M> {
    /// Makes both roles: `models` has that of the prefill role, whose pages are those of `cache`, and that of the decode role,
    /// which hands out pages of `pool` and shares none of them.
    ///
    /// # Panics
    /// As [`Scheduler::new`].
    pub fn new(
        [prefill, decode]: [M; 2],
        limits: Limits,
        cache: PrefixCache,
        pool: PagePool,
        bytes: MovedBytes,
    ) -> Self {
        let room = DecodeRoom::new(pool.clone(), limits.max_running_requests);
        Self {
            prefill: OneRole { model: prefill, scheduler: Scheduler::new(limits, cache).prefilling_for(room.clone()) },
            decode: OneRole { model: decode, scheduler: Scheduler::new(limits, PrefixCache::new(pool, false)) },
            room,
            bytes,
        }
    }
}

/// What outlives a pair: its requests, in the order prefill, decode.
#[derive(Debug)]
pub(crate) struct PairThread {
    senders: [MessageSender; 2],
    requests: [Requests; 2],
    shared: [Arc<Shared>; 2],
}

impl PairThread {
    /// Makes one without requests. Requests are sent to the first of its senders; who holds a thing that a request waits for
    /// wakes both.
    pub(crate) fn new(shared: [Arc<Shared>; 2], requests: impl Fn(MessageReceiver) -> Requests) -> Self {
        let ((prefill, arriving), (decode, moving)) = (channel(), channel());
        Self { senders: [prefill, decode], requests: [requests(arriving), requests(moving)], shared }
    }

    pub(crate) fn senders(&self) -> &[MessageSender; 2] {
        &self.senders
    }

    /// Works with a pair until one of the roles ends, and then the other one.
    pub(crate) fn run<M: StepModel + Send>(&mut self, roles: Roles<M>) -> Exit {
        let Roles { prefill, decode, room, bytes } = roles;
        let ([to_prefill, to_decode], end) = (self.senders.clone(), Arc::new(PairEnd::default()));
        let partner = |role, sender| Partner::new(role, sender, room.clone(), Arc::clone(&end), bytes);
        let (of_prefill, of_decode) = (partner(RoleName::Prefill, to_decode), partner(RoleName::Decode, to_prefill));
        let ([arriving, moving], [shared, decode_shared]) = (&mut self.requests, self.shared.clone());
        let exits = std::thread::scope(|scope| {
            let metrics = &self.shared[1].metrics;
            let decoding = scope.spawn(move || {
                let exit = work(decode, moving, decode_shared, &of_decode);
                moving.fail_all(metrics, &not_taken(&exit)); // those that moved meanwhile wait for nobody
                exit
            });
            let prefilled = work(prefill, arriving, shared, &of_prefill);
            [prefilled, decoding.join().unwrap_or_else(|panic| resume_unwind(panic))]
        });
        // A context that is lost in one of them is lost for the process; else both say how the first one ended.
        let [first, second] = exits;
        let exit = if matches!(second, Exit::ContextLost(_)) { second } else { first };
        // Those that were on their way between the two.
        self.requests[1].fail_all(&self.shared[1].metrics, &not_taken(&exit));
        exit
    }

    /// Ends every request, also those that were not taken yet.
    pub(crate) fn fail_all(&mut self, message: &str) {
        for requests in &mut self.requests {
            requests.fail_all(&self.shared[0].metrics, message);
        }
    }
}

/// What is said to a request that the decode role has not taken before it ended.
fn not_taken(exit: &Exit) -> String {
    match exit {
        Exit::Stopped => "the engine was stopped before the answer was complete".to_owned(),
        Exit::ModelLost(why) | Exit::ContextLost(why) => {
            format!("the device was lost under this request: {why}")
        }
    }
}

/// Ends a pair when the worker of a role has ended, whichever way.
struct Ending<'a> {
    partner: &'a Partner,
    exit: Option<Exit>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let panicked = || Exit::ModelLost("its thread panicked; see the log".to_owned());
        self.partner.end(self.exit.take().unwrap_or_else(panicked));
    }
}

/// The thread of one role.
fn work<M: StepModel>(role: OneRole<M>, requests: &mut Requests, shared: Arc<Shared>, partner: &Partner) -> Exit {
    let mut ending = Ending { partner, exit: None };
    let exit = Worker::new(role.model, role.scheduler, requests, shared).beside(partner.clone()).run();
    ending.exit = Some(exit.clone());
    exit
}
