//! What is done to a server while clients call it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bcg_engine::{Engine, Health};
use bcg_tests::random::rng::Rng;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::calls::{Call, Expect, QUESTIONS};
use super::client::{Client, End};
use super::life::Life;
use super::tally::Tally;

/// Requests that may wait.
pub(crate) const MAX_QUEUED: usize = 8;

/// Driver calls that need memory.
const ALLOCATIONS: [&str; 3] = ["cuMemAlloc", "cuMemMap", "cuMemAddressReserve"];

/// How long a call hangs, and how much longer the calls of a slow device take, in milliseconds.
const HANG_MS: u64 = 60;
const SLOW_MS: u64 = 1;

/// What the message of a failure says, one of them.
const CLEAR: [&str; 4] =
    ["step of this request failed", "worked on this request", "the device is lost", "The engine has stopped"];

/// How soon an engine without a device must have given up.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// As many clients as the queue bears; the prefix cache is flushed at times.
    Steady,
    /// Every second client leaves.
    Leaving,
    /// Many more clients than the queue bears.
    Overload,
    /// Steps fail, and allocations; calls hang for a while, or are slow.
    Faults,
    /// A driver call fails, and with it the device.
    Lost,
    /// Another one fails, and with it the engine.
    GivenUp,
    /// The server is told to stop while it answers.
    ShutDown,
}

/// The phases of a life, and the part of its calls in percent.
pub(crate) const PHASES: [(Phase, u64); 5] =
    [(Phase::Steady, 30), (Phase::Leaving, 20), (Phase::Overload, 25), (Phase::Faults, 15), (Phase::Lost, 10)];

impl Phase {
    fn num_clients(self) -> usize {
        match self {
            Self::Steady => 8,
            Self::Leaving => 16,
            Self::Overload => 64,
            Self::Faults | Self::Lost | Self::GivenUp => 12,
            Self::ShutDown => QUESTIONS.len(),
        }
    }

    fn leave_chance(self) -> usize {
        if self == Self::Leaving { 2 } else { 10 }
    }

    /// How long a client waits that met a full queue, as a unit.
    fn pause_ms(self) -> u64 {
        if self == Self::Overload { 4 } else { 8 }
    }

    fn may_end_with(self, end: &End) -> bool {
        match end {
            End::Answered(_) | End::Refused | End::Overloaded(_) | End::Left => true,
            End::Failed(message) => {
                let is_clear = CLEAR.iter().any(|clear| message.contains(clear));
                is_clear && matches!(self, Self::Faults | Self::Lost | Self::GivenUp)
            }
            End::Unavailable => self == Self::GivenUp,
        }
    }
}

/// What the clients of one phase share.
struct Shared {
    seed: u64,
    phase: Phase,
    next: AtomicU64,
    end: u64,
    answers: Vec<String>,
    tally: Mutex<(Tally, Vec<String>)>,
}

impl Shared {
    /// One client: makes calls until there are no more.
    async fn client(self: Arc<Self>, mut client: Client) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.end {
                return;
            }
            let call = Call::random(self.seed, number, self.phase.leave_chance());
            let end = client.call(&call).await;
            if matches!(end, Ok(End::Overloaded(_))) {
                sleep(Duration::from_millis(number % 8 * self.phase.pause_ms())).await;
            }
            let (tally, wrong) = &mut *self.tally.lock().expect("no panic");
            match end {
                Err(error) => wrong.push(format!("call {number}: {error}")),
                Ok(end) => {
                    if !self.phase.may_end_with(&end) {
                        wrong.push(format!("call {number} ended with {end:?}"));
                    }
                    if let (End::Answered(texts), Expect::Answer { question: Some(question), .. }) =
                        (&end, &call.expect)
                        && texts[0] != self.answers[*question]
                    {
                        wrong.push(format!("call {number}: {texts:?} to question {question}"));
                    }
                    tally.count(end);
                }
            }
        }
    }
}

/// The clients' side of a soak.
pub(crate) struct Soak {
    seed: u64,
    rng: Rng,
    runtime: Runtime,
    next: u64,
    answers: Vec<String>,
}

impl Soak {
    pub(crate) fn new(seed: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { seed, rng: Rng::new(seed), runtime, next: 0, answers: Vec::new() }
    }

    /// Asks a question while nobody else does.
    fn ask(&self, life: &Life, question: usize) -> String {
        let call = Call::question(question, question.is_multiple_of(2));
        match self.runtime.block_on(Client::new(life.address, life.is_tls).call(&call)) {
            Ok(End::Answered(mut texts)) => texts.remove(0),
            end => panic!("question {question} ended with {end:?}"),
        }
    }

    /// Learns the answers from the first server.
    pub(crate) fn learn_answers(&mut self, life: &Life) {
        if self.answers.is_empty() {
            self.answers = (0..QUESTIONS.len()).map(|question| self.ask(life, question)).collect();
            assert!(self.answers.iter().all(|answer| !answer.is_empty()), "{:?}", self.answers);
        }
    }

    /// Checks that the server still answers, and right.
    pub(crate) fn check_answer(&mut self, life: &Life) {
        let question = self.rng.below(QUESTIONS.len());
        assert_eq!(self.ask(life, question), self.answers[question]);
    }

    /// Makes the calls of a phase.
    pub(crate) fn run(&mut self, life: &Life, phase: Phase, num_calls: u64) -> Tally {
        let shared = self.shared(phase, num_calls);
        let injected = inject(life, &shared, &mut self.rng);
        self.runtime.block_on(async {
            let (mut injected, mut clients) = (std::pin::pin!(injected), start(life, &shared));
            let is_done = tokio::select! {
                () = &mut injected => true,
                () = joined(&mut clients) => false,
            };
            if phase == Phase::Lost && !is_done {
                injected.await;
            }
            joined(&mut clients).await;
        });
        life.control().clear_faults();
        life.faults.launch.store(false, Ordering::Relaxed);
        life.faults.collect.store(false, Ordering::Relaxed);
        settled(&shared)
    }

    fn shared(&mut self, phase: Phase, num_calls: u64) -> Arc<Shared> {
        let first = self.next;
        self.next += num_calls;
        Arc::new(Shared {
            seed: self.seed,
            phase,
            next: AtomicU64::new(first),
            end: self.next,
            answers: self.answers.clone(),
            tally: Mutex::default(),
        })
    }

    /// Shuts the server down while it answers: all that it accepted is answered.
    pub(crate) fn shut_down(&mut self, life: Life) -> Tally {
        let before = life.engine.num_accepted();
        let (engine, address, is_tls) = (Arc::clone(&life.engine), life.address, life.is_tls);
        let mut tally = Tally::default();
        let ending = self.runtime.block_on(async {
            let mut calls = JoinSet::new();
            for question in 0..Phase::ShutDown.num_clients() {
                let mut client = Client::new(address, is_tls);
                calls.spawn(async move { client.call(&Call::question(question, question % 2 == 0)).await });
            }
            while engine.num_accepted() < before + QUESTIONS.len() as u64 {
                sleep(Duration::from_millis(1)).await;
            }
            drop(engine);
            let ending = life.begin_shutdown();
            for end in calls.join_all().await {
                let end = end.expect("a shutdown lets running requests finish");
                assert!(matches!(end, End::Answered(_)), "{end:?}");
                tally.count(end);
            }
            ending
        });
        ending.finish();
        tally
    }

    /// Loses the second device while clients call: the engine gives up, and every call has an end all the same.
    pub(crate) fn give_up(&mut self, life: Life) -> Tally {
        let shared = self.shared(Phase::GivenUp, 60);
        let (engine, rng) = (Arc::clone(&life.engine), &mut self.rng);
        self.runtime.block_on(async {
            let mut clients = start(&life, &shared);
            let given_up = timeout(PATIENCE, async {
                lose_device(&life, Phase::GivenUp, rng, || matches!(engine.health(), Health::Failed(_))).await;
                engine.given_up().await;
            });
            let (given_up, ()) = tokio::join!(given_up, joined(&mut clients));
            given_up.expect("an engine without a device gives up");
        });
        drop(engine);
        life.begin_shutdown().finish();
        settled(&shared)
    }
}

fn start(life: &Life, shared: &Arc<Shared>) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for _ in 0..shared.phase.num_clients() {
        clients.spawn(Arc::clone(shared).client(Client::new(life.address, life.is_tls)));
    }
    clients
}

async fn joined(clients: &mut JoinSet<()>) {
    while let Some(ended) = clients.join_next().await {
        ended.expect("no client panics");
    }
}

/// Checks that nothing went wrong and returns the counts.
fn settled(shared: &Shared) -> Tally {
    let (tally, wrong) = std::mem::take(&mut *shared.tally.lock().expect("no panic"));
    assert!(wrong.is_empty(), "{:?}: {} wrong: {:#?}", shared.phase, wrong.len(), &wrong[..wrong.len().min(5)]);
    tally
}

/// Lets calls of the driver fail until one is taken for the loss of the device.
async fn lose_device(life: &Life, phase: Phase, rng: &mut Rng, is_lost: impl Fn() -> bool) {
    // Those of the clients may be over before one fails, so this makes some too.
    let (control, mut client) = (life.control(), Client::new(life.address, life.is_tls));
    while !is_lost() {
        control.fail_call(1 + rng.below(100) as u64);
        let end = client.call(&Call::question(0, false)).await;
        assert!(end.as_ref().is_ok_and(|end| phase.may_end_with(end)), "{end:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// What happens to the server in a phase, besides calls.
async fn inject(life: &Life, shared: &Shared, rng: &mut Rng) {
    let control = life.control();
    match shared.phase {
        Phase::Steady | Phase::Leaving | Phase::Overload | Phase::GivenUp | Phase::ShutDown => loop {
            sleep(Duration::from_millis(20 + rng.below(200) as u64)).await;
            life.engine.flush_cache();
        },
        Phase::Faults => loop {
            sleep(Duration::from_millis(5 + rng.below(40) as u64)).await;
            // Several steps that fail in a row are a lost device, so one fault at a time.
            let next = life.faults.num_steps.load(Ordering::Relaxed) + 4;
            while life.faults.num_steps.load(Ordering::Relaxed) < next {
                sleep(Duration::from_millis(1)).await;
            }
            control.clear_faults();
            match rng.below(6) {
                0 => life.faults.launch.store(true, Ordering::Relaxed),
                1 => life.faults.collect.store(true, Ordering::Relaxed),
                // The step behind a failed one makes a buffer anew, for which there is no memory then.
                2 => {
                    control.fail_calls_named("cuMemHostAlloc", 1);
                    life.faults.collect.store(true, Ordering::Relaxed);
                }
                3 => control.fail_calls_named(ALLOCATIONS[rng.below(ALLOCATIONS.len())], 1),
                4 => control.inject(&format!("hang:any:{}:{HANG_MS}", 1 + rng.below(100))).expect("a fault"),
                _ => control.inject(&format!("slow:any:1:{SLOW_MS}")).expect("a fault"),
            }
        },
        Phase::Lost => {
            let third = shared.end - (shared.end - shared.next.load(Ordering::Relaxed)) * 2 / 3;
            while shared.next.load(Ordering::Relaxed) < third {
                sleep(Duration::from_millis(1)).await;
            }
            lose_device(life, Phase::Lost, rng, || life.num_loads() > 1).await;
        }
    }
}
