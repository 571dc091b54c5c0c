//! Every knob of an engine, in one struct, and their one check.
//!
//! A knob has the same name here, in [`bcg_models`] and on the command line: the option `context_length` is the flag
//! `--context-length`. Messages name options in backticks.

mod devices;

use std::path::PathBuf;
use std::time::Duration;

use bcg_models::weights::MoeA2a;
use bcg_models::{GraphMode, LoadFormat, ModelRunnerOptions, OptionError};

use super::roles::RoleDevice;
use super::watchdog::WatchdogOptions;

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA if there is a usable GPU, else the host device.
    #[default]
    Auto,
    /// The emulated device; it needs no GPU.
    Host,
    /// CUDA GPUs, from the first one on if [`EngineOptions::devices`] names none; it is an error if there are too few.
    Cuda,
}

/// When graphs are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CaptureMode {
    /// Every size of the ladder is captured before the first request is served.
    #[default]
    Ahead,
    /// The exact size of each step is captured when it first runs.
    Lazy,
}

/// How much may wait in an engine, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueOptions {
    /// Submissions that may wait, whatever the number of their answers.
    pub max_queued_requests: usize,
    /// Answers that may wait, over all submissions.
    pub max_queued_choices: usize,
    /// How long a request may wait before it begins to run; `None` for ever.
    pub queue_timeout: Option<Duration>,
}

impl Default for QueueOptions {
    fn default() -> Self {
        EngineOptions::default().queue()
    }
}

/// How an engine is set up. [`EngineOptions::check`] says whether the options fit together.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Folder of a Hugging Face checkpoint.
    pub model: PathBuf,
    /// Name of the model for clients; the folder's name if `None`.
    pub served_model_name: Option<String>,
    /// Where the weights come from.
    pub load_format: LoadFormat,
    /// Runs without `tokenizer.json`: prompts and answers are token ids.
    pub skip_tokenizer_init: bool,
    /// Takes what clients send, in messages and in prompts of text, for the control tokens that it spells, such as
    /// `<|im_start|>`; else it stays text.
    pub allow_special_tokens_in_content: bool,
    /// Where the model runs.
    pub device: DeviceChoice,
    /// Tensor parallelism: the ranks that the model is divided among, each of which has a device.
    pub tp: usize,
    /// Expert parallelism: 1, or equal to `tp`; each rank then has a share of the experts, those whole, in place of a share of
    /// every expert.
    pub ep: usize,
    /// With `ep`: how rows come to experts that other ranks own.
    pub moe_a2a_backend: MoeA2a,
    /// Pipeline parallelism: the stages that the model's layers are divided among, each of which has `tp` ranks.
    pub pp: usize,
    /// Replicas: engines that share the requests, each with the whole model on `tp` times `pp` devices of its own.
    pub dp: usize,
    /// The numbers of the GPUs of the ranks, in order, replica after replica, and in each stage after stage; a GPU that is
    /// named several times has several ranks. `None` takes the first ones.
    pub devices: Option<Vec<usize>>,
    /// The number of processes, or nodes, that the ranks live in: each has `tp / nnodes` of them, and `devices` names those of
    /// this one.
    pub nnodes: usize,
    /// This process among them. Node 0 serves, and the others follow it.
    pub node_rank: usize,
    /// Where node 0 listens until all nodes are there, `HOST:PORT`, on a network that is trusted.
    pub dist_init_addr: Option<String>,
    /// Prefill apart from decode: each of the two roles, and its GPU. Without any, one engine does both.
    pub disaggregation: Vec<RoleDevice>,
    /// Replays prefills as breakable CUDA graphs and decodes as full ones.
    pub enable_breakable_cuda_graph: bool,
    /// The largest token count of a prefill that gets a graph; `None` takes `chunked_prefill_size`.
    pub cuda_graph_max_tokens: Option<usize>,
    /// Token counts of prefills to capture; `None` takes the default ladder.
    pub cuda_graph_sizes: Option<Vec<usize>>,
    /// Batch sizes of decodes to capture; `None` takes the default ladder.
    pub cuda_graph_decode_sizes: Option<Vec<usize>>,
    /// When graphs are captured.
    pub capture: CaptureMode,
    /// The most graphs of each phase that are held with [`CaptureMode::Lazy`]; `None` takes the default.
    pub cuda_graph_lazy_max_graphs: Option<usize>,
    /// The most device memory of the graphs of each phase with [`CaptureMode::Lazy`], in MiB; `None` takes the default.
    pub cuda_graph_lazy_max_mib: Option<usize>,
    /// Runs eagerly what would replay a graph, with the padded rows of that graph, and captures nothing: to tell a bug of a
    /// graph from a bug of the model.
    pub debug_cuda_graph: bool,
    /// Compares every Nth replay with an eager run of the same step.
    pub verify_graph: Option<u32>,
    /// Fills freed graph memory with a pattern that shows up when it is read.
    pub poison_graph_memory: bool,
    /// The most sequences that run together.
    pub max_running_requests: usize,
    /// The most submissions that wait, whatever the number of their answers; one more is refused. One client may hold four
    /// times as many as stay free.
    pub max_queued_requests: usize,
    /// The most answers that wait, over all submissions; a submission with one more is refused. One client may hold four
    /// times as many as stay free.
    pub max_queued_choices: usize,
    /// How long a request may wait before it begins to run; it fails then. Zero lets it wait for ever.
    pub queue_timeout: Duration,
    /// How long a step, or a grammar's work, may take before the engine counts as stuck; ten times as long for a step that
    /// may capture graphs or is the first of its size. Zero does not watch.
    pub watchdog_timeout: Duration,
    /// The most tokens of prompt and answer together; `None` takes the model's.
    pub context_length: Option<usize>,
    /// Tokens that the KV cache holds over all sequences; `None` sizes it from the model and the device.
    pub kv_cache_tokens: Option<usize>,
    /// The part of the device's memory, 0.0 to 1.0, for weights, activations, graphs and KV cache together: the cache
    /// gets what the others leave of it. `kv_cache_tokens` wins; `None` takes the default.
    pub mem_fraction_static: Option<f64>,
    /// Tokens in one page of the KV cache.
    pub page_size: usize,
    /// The most new tokens in one step; a longer prompt is prefilled in chunks.
    pub chunked_prefill_size: usize,
    /// Computes every prompt from its first token, even if another one began alike.
    pub disable_radix_cache: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            model: PathBuf::new(),
            served_model_name: None,
            load_format: LoadFormat::Auto,
            skip_tokenizer_init: false,
            allow_special_tokens_in_content: false,
            device: DeviceChoice::Auto,
            tp: 1,
            ep: 1,
            moe_a2a_backend: MoeA2a::None,
            pp: 1,
            dp: 1,
            devices: None,
            nnodes: 1,
            node_rank: 0,
            dist_init_addr: None,
            disaggregation: Vec::new(),
            enable_breakable_cuda_graph: false,
            cuda_graph_max_tokens: None,
            cuda_graph_sizes: None,
            cuda_graph_decode_sizes: None,
            capture: CaptureMode::Ahead,
            cuda_graph_lazy_max_graphs: None,
            cuda_graph_lazy_max_mib: None,
            debug_cuda_graph: false,
            verify_graph: None,
            poison_graph_memory: false,
            max_running_requests: 64,
            max_queued_requests: 256,
            max_queued_choices: 4096,
            queue_timeout: Duration::from_secs(300),
            watchdog_timeout: Duration::from_secs(60),
            context_length: None,
            kv_cache_tokens: None,
            mem_fraction_static: None,
            page_size: 16,
            chunked_prefill_size: 2048,
            disable_radix_cache: false,
        }
    }
}

impl EngineOptions {
    /// Returns the default options for the checkpoint in `model`.
    pub fn new(model: impl Into<PathBuf>) -> Self {
        Self { model: model.into(), ..Self::default() }
    }

    /// Lets one client have this many requests waiting at once.
    pub fn let_wait(&mut self, requests: usize) {
        // A client may hold four fifths of the places.
        let places = requests.saturating_add(requests.div_ceil(4));
        self.max_queued_requests = self.max_queued_requests.max(places);
        self.max_queued_choices = self.max_queued_choices.max(places);
    }

    /// Checks the options against each other. What needs the model's configuration is checked when it is loaded.
    ///
    /// # Errors
    /// [`OptionError`] names the option, the problem and the remedy.
    pub fn check(&self) -> Result<(), OptionError> {
        // What is not given depends on the model: these stand for values that break no rule.
        let (context_length, kv_cache_tokens) =
            (self.context_length.unwrap_or(1), self.kv_cache_tokens.unwrap_or(i32::MAX as usize));
        self.runner_options(context_length, kv_cache_tokens, self.mem_fraction_static).check()?;
        OptionError::positive("max_queued_requests", self.max_queued_requests)?;
        OptionError::positive("max_queued_choices", self.max_queued_choices)?;
        OptionError::seconds("queue_timeout", self.queue_timeout)?;
        OptionError::seconds("watchdog_timeout", self.watchdog_timeout)?;
        if let Some(tokens) = self.kv_cache_tokens {
            let least = self.context_length.unwrap_or(0).max(self.page_size);
            if tokens < least {
                return Err(OptionError::new(
                    "kv_cache_tokens",
                    format!("{tokens} tokens cannot hold one sequence of {least}"),
                    "raise it or lower `context_length`",
                ));
            }
        }
        self.check_devices()?;
        self.check_graphs()
    }

    /// How much may wait, and how long.
    pub(crate) fn queue(&self) -> QueueOptions {
        QueueOptions {
            max_queued_requests: self.max_queued_requests,
            max_queued_choices: self.max_queued_choices,
            queue_timeout: Some(self.queue_timeout).filter(|timeout| !timeout.is_zero()),
        }
    }

    /// How closely the engine is watched.
    pub(crate) fn watchdog(&self) -> WatchdogOptions {
        WatchdogOptions {
            timeout: Some(self.watchdog_timeout).filter(|timeout| !timeout.is_zero()),
            captures_lazily: self.graph_mode() == GraphMode::Lazy,
        }
    }

    /// Whether and when graphs are captured.
    pub(crate) fn graph_mode(&self) -> GraphMode {
        match (self.enable_breakable_cuda_graph, self.capture) {
            (false, _) => GraphMode::Off,
            (true, CaptureMode::Ahead) => GraphMode::Ahead,
            (true, CaptureMode::Lazy) => GraphMode::Lazy,
        }
    }

    /// The options of the model's runner, with what the model decides.
    pub(crate) fn runner_options(
        &self,
        context_length: usize,
        kv_cache_tokens: usize,
        mem_fraction_static: Option<f64>,
    ) -> ModelRunnerOptions {
        let default = ModelRunnerOptions::default();
        ModelRunnerOptions {
            load_format: self.load_format,
            experts: self.experts(),
            skip_tokenizer_init: self.skip_tokenizer_init,
            page_size: self.page_size,
            kv_cache_tokens,
            mem_fraction_static,
            max_running_requests: self.max_running_requests,
            context_length,
            chunked_prefill_size: self.chunked_prefill_size,
            graph: self.graph_mode(),
            cuda_graph_sizes: self.cuda_graph_sizes.clone(),
            cuda_graph_decode_sizes: self.cuda_graph_decode_sizes.clone(),
            cuda_graph_max_tokens: self.cuda_graph_max_tokens,
            cuda_graph_lazy_max_graphs: self.cuda_graph_lazy_max_graphs.unwrap_or(default.cuda_graph_lazy_max_graphs),
            cuda_graph_lazy_max_mib: self.cuda_graph_lazy_max_mib.unwrap_or(default.cuda_graph_lazy_max_mib),
            debug_cuda_graph: self.debug_cuda_graph,
            verify_graph: self.verify_graph,
            poison_graph_memory: self.poison_graph_memory,
        }
    }

    fn check_graphs(&self) -> Result<(), OptionError> {
        let sizes = [
            ("cuda_graph_sizes", self.cuda_graph_sizes.is_some()),
            ("cuda_graph_decode_sizes", self.cuda_graph_decode_sizes.is_some()),
        ];
        let budget = [
            ("cuda_graph_lazy_max_graphs", self.cuda_graph_lazy_max_graphs.is_some()),
            ("cuda_graph_lazy_max_mib", self.cuda_graph_lazy_max_mib.is_some()),
        ];
        let others = [
            ("cuda_graph_max_tokens", self.cuda_graph_max_tokens.is_some()),
            ("capture", self.capture != CaptureMode::Ahead),
            ("debug_cuda_graph", self.debug_cuda_graph),
            ("verify_graph", self.verify_graph.is_some()),
            ("poison_graph_memory", self.poison_graph_memory),
        ];
        let (problem, remedy) = ("has no effect while graphs are off", "add `enable_breakable_cuda_graph` or drop it");
        let is_off = !self.enable_breakable_cuda_graph;
        refuse(is_off, &[&sizes[..], &budget, &others].concat(), problem, remedy)?;
        let is_lazy = self.capture == CaptureMode::Lazy;
        let problem = "`capture` lazy captures the exact sizes that it meets";
        refuse(is_lazy, &sizes, problem, "drop one of the two options")?;
        let problem = "every size of the ladder is captured ahead and kept";
        refuse(!is_lazy, &budget, problem, "add `capture` lazy or drop it")?;
        OptionError::positive("cuda_graph_lazy_max_mib", self.cuda_graph_lazy_max_mib.unwrap_or(1))?;
        self.check_sizes()
    }

    fn check_sizes(&self) -> Result<(), OptionError> {
        if self.cuda_graph_max_tokens == Some(0) {
            return Err(OptionError::new(
                "cuda_graph_max_tokens",
                "0 leaves no size to capture",
                "give at least 1 or drop `enable_breakable_cuda_graph`",
            ));
        }
        check_ladder("cuda_graph_decode_sizes", self.cuda_graph_decode_sizes.as_deref())?;
        let Some(most) = check_ladder("cuda_graph_sizes", self.cuda_graph_sizes.as_deref())? else { return Ok(()) };
        let refused = |problem, remedy| Err(OptionError::new("cuda_graph_sizes", problem, remedy));
        match self.cuda_graph_max_tokens {
            _ if most > self.chunked_prefill_size => refused(
                format!("no step has {most} tokens, `chunked_prefill_size` is {}", self.chunked_prefill_size),
                "raise `chunked_prefill_size` or drop that size",
            ),
            Some(max) if most > max => refused(
                format!("{most} is above `cuda_graph_max_tokens` {max}"),
                "raise `cuda_graph_max_tokens` or drop that size",
            ),
            _ => Ok(()),
        }
    }
}

/// Refuses the first option that is given, if none of them may be.
fn refuse(
    is_refused: bool,
    given: &[(&'static str, bool)],
    problem: &'static str,
    remedy: &'static str,
) -> Result<(), OptionError> {
    match given.iter().find(|(_, given)| is_refused && *given) {
        Some(&(option, _)) => Err(OptionError::new(option, problem, remedy)),
        None => Ok(()),
    }
}

/// Refuses no size and 0, and returns the largest.
fn check_ladder(option: &'static str, sizes: Option<&[usize]>) -> Result<Option<usize>, OptionError> {
    match sizes {
        None => Ok(None),
        Some([]) => Err(OptionError::new(
            option,
            "names no size, so nothing could be captured",
            "give sizes such as 1,2,4,8, drop it for the default ladder, or drop `enable_breakable_cuda_graph`",
        )),
        Some(sizes) if sizes.contains(&0) => Err(OptionError::new(option, "0 is no size", "give sizes of at least 1")),
        Some(sizes) => Ok(sizes.iter().copied().max()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ClientId, FairPlaces};

    #[track_caller]
    pub(super) fn refused(change: impl FnOnce(&mut EngineOptions), option: &str, remedy: &str) {
        let mut options = EngineOptions::new("m");
        change(&mut options);
        let error = options.check().expect_err("these options cannot work");
        assert_eq!(error.option, option);
        assert!(error.to_string().contains(remedy), "{error}");
    }

    #[test]
    fn defaults_run_eagerly() {
        let options = EngineOptions::new("m");
        options.check().expect("defaults work");
        assert_eq!(options.graph_mode(), GraphMode::Off);
    }

    #[test]
    fn one_client_can_have_as_many_waiting_as_it_is_let() {
        for requests in [0, 1, 5, 6, 1000, 1003] {
            let mut options = EngineOptions::new("m");
            (options.max_queued_requests, options.max_queued_choices) = (1, 1);
            options.let_wait(requests);
            let (places, client) = (FairPlaces::new(options.max_queued_requests), ClientId::default());
            let held: Vec<_> = (0..requests).map_while(|_| places.try_take(&client, 1)).collect();
            assert_eq!((held.len(), options.max_queued_choices), (requests, options.max_queued_requests));
        }
    }

    #[test]
    fn an_empty_ladder_is_refused_with_a_remedy() {
        let ladder = |options: &mut EngineOptions| {
            (options.enable_breakable_cuda_graph, options.cuda_graph_sizes) = (true, Some(Vec::new()));
        };
        refused(ladder, "cuda_graph_sizes", "drop it for the default");
        let limit = |options: &mut EngineOptions| {
            (options.enable_breakable_cuda_graph, options.cuda_graph_max_tokens) = (true, Some(0));
        };
        refused(limit, "cuda_graph_max_tokens", "drop `enable_breakable_cuda_graph`");
    }

    #[test]
    fn rules_of_the_runner_are_those_of_the_engine() {
        refused(|options| options.page_size = 0, "page_size", "at least 1");
        refused(|options| options.mem_fraction_static = Some(90.0), "mem_fraction_static", "such as 0.9");
        refused(|options| options.max_queued_requests = 0, "max_queued_requests", "at least 1");
        refused(|options| options.max_queued_choices = 0, "max_queued_choices", "at least 1");
        refused(|options| options.chunked_prefill_size = 8, "chunked_prefill_size", "lower `max_running_requests`");
    }
}
