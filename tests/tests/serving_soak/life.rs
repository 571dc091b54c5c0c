//! One life of a server: the tiny checkpoint on a host device whose faults the soak controls, behind real HTTP.
//!
//! It wraps the engine to count what is accepted, and the runner to let steps fail. All else is what `bcg-server` runs.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bcg_engine::local::{LocalEngine, LocalOptions};
use bcg_engine::metrics::{Metrics, ReasonLabel};
use bcg_engine::model::{GraphCounters, StepError, StepModel};
use bcg_engine::prefix_cache::PrefixCache;
use bcg_engine::scheduler::{Limits, Scheduler};
use bcg_engine::{
    Engine, EventStream, Health, ModelInfo, Prompt, QueueOptions, Submission, SubmitError, WatchdogOptions,
};
use bcg_models::state::PagePool;
use bcg_models::{ChatTemplate, GraphMode, ModelRunner, ModelRunnerOptions, SampledToken, SequenceInput};
use bcg_runtime::{Device, HostControl, LiveObjects};
use bcg_server::{HttpOptions, serve};
use serde_json::Value;
use tokio::sync::oneshot;

/// Longer than the engine takes for anything; waiting longer means that something is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a request can end.
const REASONS: [&str; 5] = ["stop", "length", "cancelled", "failed", "queue_timeout"];

/// How a server is set up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) graph: GraphMode,
    pub(crate) page_size: usize,
    pub(crate) kv_cache_tokens: usize,
    pub(crate) chunked_prefill_size: usize,
    pub(crate) prefix_cache: bool,
}

/// The certificate of the server, which its clients trust, and its key.
pub(crate) const CERT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tls/cert.pem");
const KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tls/key.pem");

/// The setups, in turn.
pub(crate) const SETUPS: [Setup; 4] = [
    Setup { graph: GraphMode::Off, page_size: 2, kv_cache_tokens: 512, chunked_prefill_size: 256, prefix_cache: true },
    Setup {
        graph: GraphMode::Ahead,
        page_size: 16,
        kv_cache_tokens: 768,
        chunked_prefill_size: 64,
        prefix_cache: true,
    },
    Setup { graph: GraphMode::Lazy, page_size: 8, kv_cache_tokens: 640, chunked_prefill_size: 32, prefix_cache: true },
    Setup {
        graph: GraphMode::Ahead,
        page_size: 1,
        kv_cache_tokens: 512,
        chunked_prefill_size: 128,
        prefix_cache: false,
    },
];

impl Setup {
    /// Whether clients come over TLS: every second setup's do.
    fn is_tls(self) -> bool {
        self.graph == GraphMode::Ahead
    }

    fn runner_options(self) -> ModelRunnerOptions {
        ModelRunnerOptions {
            page_size: self.page_size,
            kv_cache_tokens: self.kv_cache_tokens,
            max_running_requests: 8,
            context_length: 512,
            chunked_prefill_size: self.chunked_prefill_size,
            graph: self.graph,
            cuda_graph_sizes: (self.graph == GraphMode::Ahead).then(|| vec![8, 16, 32, 64]),
            cuda_graph_decode_sizes: (self.graph == GraphMode::Ahead).then(|| vec![1, 2, 4, 8]),
            cuda_graph_lazy_max_graphs: 12,
            ..ModelRunnerOptions::default()
        }
    }
}

/// A step that fails, as one does for which there is no memory.
#[derive(Debug, Default)]
pub(crate) struct StepFaults {
    pub(crate) launch: AtomicBool,
    pub(crate) collect: AtomicBool,
    /// Steps that went well.
    pub(crate) num_steps: AtomicU64,
}

fn strike(fault: &AtomicBool) -> Result<(), StepError> {
    match fault.swap(false, Ordering::Relaxed) {
        true => Err(StepError::harmless("injected")),
        false => Ok(()),
    }
}

struct Flaky {
    runner: ModelRunner,
    faults: Arc<StepFaults>,
}

impl StepModel for Flaky {
    type Pending = <ModelRunner as StepModel>::Pending;

    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<Self::Pending, StepError> {
        strike(&self.faults.launch)?;
        StepModel::launch(&mut self.runner, batch)
    }

    fn collect(&mut self, step: Self::Pending) -> Result<Vec<SampledToken>, StepError> {
        let collected = StepModel::collect(&mut self.runner, step);
        strike(&self.faults.collect)?;
        self.faults.num_steps.fetch_add(u64::from(collected.is_ok()), Ordering::Relaxed);
        collected
    }

    fn stats(&self) -> GraphCounters {
        StepModel::stats(&self.runner)
    }
}

/// The engine, and how many requests it accepted.
pub(crate) struct Counted {
    engine: LocalEngine,
    accepted: AtomicU64,
}

impl Counted {
    pub(crate) fn num_accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        self.engine.metrics()
    }

    fn num_ended(&self) -> u64 {
        REASONS.map(|reason| self.num_ended_by(reason)).iter().sum()
    }

    pub(crate) fn num_ended_by(&self, reason: &'static str) -> u64 {
        self.metrics().finished.get_or_create(&ReasonLabel { reason }).get()
    }

    /// Waits until the engine will never serve again.
    pub(crate) async fn given_up(&self) {
        self.engine.given_up().await;
    }
}

impl Engine for Counted {
    fn info(&self) -> &ModelInfo {
        self.engine.info()
    }

    fn submit_all(&self, submission: Submission) -> Result<Vec<EventStream>, SubmitError> {
        let submitted = self.engine.submit_all(submission);
        self.accepted.fetch_add(submitted.as_ref().map_or(0, Vec::len) as u64, Ordering::Relaxed);
        submitted
    }

    fn probe(&self) -> Result<EventStream, SubmitError> {
        let probe = self.engine.probe();
        self.accepted.fetch_add(u64::from(probe.is_ok()), Ordering::Relaxed);
        probe
    }

    fn num_steps(&self) -> u64 {
        self.engine.num_steps()
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, SubmitError> {
        self.engine.encode(text, add_special_tokens)
    }

    fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, SubmitError> {
        self.engine.decode(tokens, skip_special_tokens)
    }

    fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        self.engine.prompt_tokens(prompt)
    }

    fn flush_cache(&self) {
        self.engine.flush_cache();
    }

    fn server_info(&self) -> Value {
        self.engine.server_info()
    }

    fn health(&self) -> Health {
        self.engine.health()
    }

    fn replica_metrics(&self) -> Vec<&Metrics> {
        self.engine.replica_metrics()
    }

    fn drain(&self) {
        self.engine.drain();
    }
}

/// A device that the model was loaded on.
struct Loaded {
    device: Device,
    baseline: LiveObjects,
    pages: PagePool,
}

/// A running server and what it is made of.
pub(crate) struct Life {
    pub(crate) engine: Arc<Counted>,
    pub(crate) faults: Arc<StepFaults>,
    pub(crate) address: SocketAddr,
    pub(crate) is_tls: bool,
    loaded: Arc<Mutex<Vec<Loaded>>>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Life {
    pub(crate) fn start(setup: Setup, max_queued_requests: usize) -> Self {
        let (loaded, faults) = (Arc::new(Mutex::new(Vec::new())), Arc::new(StepFaults::default()));
        let (all, flaky) = (Arc::clone(&loaded), Arc::clone(&faults));
        let engine =
            LocalEngine::start(move || load(setup, max_queued_requests, &all, &flaky)).expect("the checkpoint loads");
        let engine = Arc::new(Counted { engine, accepted: AtomicU64::new(0) });
        let (stop, stopped) = oneshot::channel();
        let (ready, address) = mpsc::channel();
        let (served, is_tls) = (Arc::clone(&engine), setup.is_tls());
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                ready.send(listener.local_addr().expect("an address")).expect("the soak waits");
                let shutdown = async {
                    let _ = stopped.await;
                };
                let mut options = HttpOptions::default();
                if is_tls {
                    (options.tls_cert, options.tls_key) = (Some(CERT.into()), Some(KEY.into()));
                }
                serve(served, listener, &options, shutdown).await.expect("the options fit");
            });
        });
        let address = address.recv().expect("the server starts");
        Self { engine, faults, address, is_tls, loaded, stop, server }
    }

    /// How often the model was loaded.
    pub(crate) fn num_loads(&self) -> usize {
        self.loaded.lock().expect("no panic").len()
    }

    /// The controls of the device that serves now.
    pub(crate) fn control(&self) -> HostControl {
        let loaded = self.loaded.lock().expect("no panic");
        loaded.last().and_then(|loaded| loaded.device.host_control()).expect("a host device").clone()
    }

    /// Waits until nothing runs, then checks that all that was accepted has ended, once, and that it holds nothing.
    pub(crate) fn check_at_rest(&self) {
        let metrics = || self.engine.metrics();
        eventually("every accepted request ends", || self.engine.num_ended() >= self.engine.num_accepted());
        eventually("nothing waits, runs or holds pages", || {
            metrics().queue_depth.get() + metrics().running.get() + metrics().kv_pages_used.get() == 0
        });
        assert_eq!(self.engine.num_ended(), self.engine.num_accepted(), "every request has one end");
        self.engine.flush_cache();
        eventually("a flushed cache holds nothing", || metrics().kv_pages_cached.get() == 0);
        let loaded = self.loaded.lock().expect("no panic");
        let pages = &loaded.last().expect("a device").pages;
        assert_eq!(pages.num_free(), pages.num_pages(), "pages");
        for gone in &loaded[..loaded.len() - 1] {
            assert_eq!(gone.device.live_objects(), gone.baseline, "what is left on a lost device");
        }
    }

    /// What lives on the device that serves now.
    pub(crate) fn live_objects(&self) -> LiveObjects {
        self.loaded.lock().expect("no panic").last().expect("a device").device.live_objects()
    }

    /// Stops accepting; what runs goes on.
    pub(crate) fn begin_shutdown(self) -> Ending {
        let Self { engine, loaded, stop, server, .. } = self;
        let _ = stop.send(());
        Ending { engine, loaded, server }
    }
}

/// A server that shuts down.
pub(crate) struct Ending {
    engine: Arc<Counted>,
    loaded: Arc<Mutex<Vec<Loaded>>>,
    server: JoinHandle<()>,
}

impl Ending {
    /// Waits for the end, and checks that nothing is left on any device.
    pub(crate) fn finish(self) {
        self.server.join().expect("the server did not panic");
        assert_eq!(Arc::strong_count(&self.engine), 1, "nobody has the engine any more");
        eventually("every accepted request ends", || self.engine.num_ended() >= self.engine.num_accepted());
        assert_eq!(self.engine.num_ended(), self.engine.num_accepted(), "every request has one end");
        drop(self.engine);
        for loaded in self.loaded.lock().expect("no panic").iter() {
            assert_eq!(loaded.device.live_objects(), loaded.baseline, "what is left on a device");
            assert_eq!(loaded.pages.num_free(), loaded.pages.num_pages(), "pages");
        }
    }
}

fn load(
    setup: Setup,
    max_queued_requests: usize,
    loaded: &Mutex<Vec<Loaded>>,
    faults: &Arc<StepFaults>,
) -> anyhow::Result<(Flaky, Scheduler, LocalOptions)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
    let device = Device::host();
    let baseline = device.live_objects();
    let mut runner = ModelRunner::load(&device, &dir, setup.runner_options(), &mut |_| ())?;
    runner.capture(&mut |_| ())?;
    let (options, config) = (runner.options(), runner.config());
    let limits = Limits {
        max_running_requests: options.max_running_requests,
        chunked_prefill_size: options.chunked_prefill_size,
        context_length: options.context_length,
    };
    let info = ModelInfo {
        name: "tiny".into(),
        created: 0,
        context_length: limits.context_length,
        vocab_size: config.vocab_size,
        has_tokenizer: true,
    };
    let local = LocalOptions {
        info,
        tokenizer: Some(runner.tokenizer()?.clone()),
        chat: ChatTemplate::load(&dir)?,
        eos: config.eos_token_ids.clone(),
        queue: QueueOptions { max_queued_requests, ..QueueOptions::default() },
        watchdog: WatchdogOptions { timeout: Some(PATIENCE), captures_lazily: true },
        prefix_cache_tokens: 0,
        settings: Value::Null,
    };
    let pages = runner.pages().clone();
    let scheduler = Scheduler::new(limits, PrefixCache::new(pages.clone(), setup.prefix_cache));
    loaded.lock().expect("no panic").push(Loaded { device, baseline, pages });
    Ok((Flaky { runner, faults: Arc::clone(faults) }, scheduler, local))
}

#[track_caller]
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
