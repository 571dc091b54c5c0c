//! From options to a running engine: device, sizes, weights, graphs.

use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use bcg_models::weights::Shard;
use bcg_models::{
    CaptureSummary, ChatTemplate, GraphMode, ModelConfig, ModelRunner, ModelRunnerOptions, Phase, Progress, registry,
};
use bcg_runtime::{Device, DeviceKind, HostOptions, SpanOptions};
use serde_json::{Value, json};

use super::ModelInfo;
use super::local::{LocalEngine, LocalOptions};
use super::model::StepModel;
use super::options::{DeviceChoice, EngineOptions};
use super::prefix_cache::PrefixCache;
use super::roles;
use super::scheduler::{Limits, Scheduler};

/// The part of a GPU's memory for weights, activations, graphs and KV cache. The rest is left to kernels that are loaded
/// later, and to other processes.
const MEM_FRACTION_STATIC: f64 = 0.9;

/// KV cache bytes on the host device when no option says how many tokens it holds.
const HOST_KV_BYTES: usize = 128 << 20;

/// Loads the model on the engine's thread and returns the engine once it serves. `progress` sees how far the load is; it is
/// called again if the device is lost and the model loaded once more.
///
/// # Errors
/// [`OptionError`](crate::OptionError) for options that do not fit together or not the model; what is wrong with the checkpoint or the device.
pub fn start(options: &EngineOptions, progress: impl FnMut(Progress) + Send + 'static) -> anyhow::Result<LocalEngine> {
    start_with(options, progress, Ok)
}

/// As [`start`], with what `model` makes of the runner: a model that counts, or one that fails on purpose.
///
/// # Errors
/// As [`start`]; what `model` returns.
pub fn start_with<M: StepModel + Send>(
    options: &EngineOptions,
    mut progress: impl FnMut(Progress) + Send + 'static,
    mut model: impl FnMut(ModelRunner) -> anyhow::Result<M> + Send + 'static,
) -> anyhow::Result<LocalEngine> {
    options.check()?;
    options.check_first_node()?;
    options.check_only_replica()?;
    let loader = Loader::new(options, 0);
    if let Some(gpus) = options.role_gpus() {
        return roles::start_with(loader, gpus, progress, model);
    }
    LocalEngine::start(move || loader.load(&mut progress, &mut model))
}

/// Loads the model of one replica, once and again.
#[derive(Debug)]
pub(crate) struct Loader {
    options: EngineOptions,
    replica: usize,
    /// Name of the model, and when it was first loaded.
    name: String,
    created: u64,
}

impl Loader {
    pub(crate) fn new(options: &EngineOptions, replica: usize) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let name = options.served_model_name.clone().unwrap_or_else(|| folder_name(&options.model));
        Self { options: options.clone(), replica, name, created }
    }

    /// Loads the model, and says how an engine uses it.
    pub(crate) fn load<M: StepModel>(
        &self,
        progress: &mut dyn FnMut(Progress),
        model: &mut dyn FnMut(ModelRunner) -> anyhow::Result<M>,
    ) -> anyhow::Result<(M, Scheduler, LocalOptions)> {
        let runner = load_replica(&self.options, self.replica, progress)?;
        let (limits, has_prefix_cache, local) = self.describe(&runner)?;
        let cache = PrefixCache::new(runner.pages().clone(), has_prefix_cache);
        let scheduler = Scheduler::new(limits, cache).with_stages(runner.num_stages());
        Ok((model(runner)?, scheduler, local))
    }

    pub(crate) fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// The bounds of a runner's scheduler, whether it has a prefix cache, and what the front door knows of it.
    pub(crate) fn describe(&self, runner: &ModelRunner) -> anyhow::Result<(Limits, bool, LocalOptions)> {
        let options = &self.options;
        let chat = if options.skip_tokenizer_init { None } else { ChatTemplate::load(&options.model)? };
        let limits = Limits {
            max_running_requests: runner.options().max_running_requests,
            chunked_prefill_size: runner.options().chunked_prefill_size,
            context_length: runner.options().context_length,
        };
        // A state stands for all tokens before it and cannot be turned back to where a prefix ends.
        let has_states = runner.has_states();
        let has_prefix_cache = !options.disable_radix_cache && !has_states;
        if has_states && !options.disable_radix_cache {
            tracing::info!("no prefix cache: the model has state-space layers");
        }
        let info = ModelInfo {
            name: self.name.clone(),
            created: self.created,
            context_length: limits.context_length,
            vocab_size: runner.config().vocab_size,
            has_tokenizer: !options.skip_tokenizer_init,
        };
        let allows_control = options.allow_special_tokens_in_content;
        let tokenizer = runner.tokenizer().ok().cloned();
        let local = LocalOptions {
            info,
            tokenizer: tokenizer.map(|tokenizer| tokenizer.allow_control_tokens_in_content(allows_control)),
            chat,
            eos: runner.config().eos_token_ids.clone(),
            queue: options.queue(),
            watchdog: options.watchdog(),
            prefix_cache_tokens: if has_prefix_cache { runner.pages().num_pages() * options.page_size } else { 0 },
            settings: settings(options, runner, has_prefix_cache),
        };
        Ok((limits, has_prefix_cache, local))
    }
}

/// What an operator may want to know of a running engine.
fn settings(options: &EngineOptions, runner: &ModelRunner, has_prefix_cache: bool) -> Value {
    let of_runner = runner.options();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "device": runner.device().name(),
        "tp": runner.num_ranks(),
        "pp": runner.num_stages(),
        "ep": options.ep,
        "moe_a2a_backend": format!("{:?}", options.moe_a2a_backend).to_lowercase(),
        "dp": options.dp,
        "nnodes": runner.world().num_nodes(),
        "devices": runner.devices().map(Device::name).collect::<Vec<_>>(),
        "architecture": runner.config().architecture,
        "model_type": runner.config().fields.get("model_type"),
        "model_path": options.model.display().to_string(),
        "page_size": of_runner.page_size,
        "kv_cache_pages": runner.pages().num_pages(),
        "max_running_requests": of_runner.max_running_requests,
        "chunked_prefill_size": of_runner.chunked_prefill_size,
        "radix_cache": has_prefix_cache,
        "graph_mode": format!("{:?}", of_runner.graph).to_lowercase(),
        "prefill_graph_sizes": runner.graph_sizes(Phase::Prefill),
        "decode_graph_sizes": runner.graph_sizes(Phase::Decode),
    })
}

/// Loads the model and captures its graphs, with a log line for each stage and a summary.
///
/// # Errors
/// As [`start`]; that of `node_rank` for a node that only follows.
pub fn load_runner(options: &EngineOptions, progress: &mut dyn FnMut(Progress)) -> anyhow::Result<ModelRunner> {
    options.check_first_node()?;
    options.check_only_replica()?;
    load_replica(options, 0, progress)
}

/// Loads this node's part of a model and does what node 0 does, until that one leaves in order.
///
/// # Errors
/// As [`start`]; that a rank of any node is lost: what runs here cannot go on, and node 0 waits for a new process.
pub fn follow(options: &EngineOptions, mut progress: impl FnMut(Progress)) -> anyhow::Result<()> {
    let ends = || format!("node {} ends", options.node_rank);
    let mut runner = load_replica(options, 0, &mut progress).with_context(ends)?;
    tracing::info!(node = options.node_rank, nodes = options.nnodes, "following node 0");
    runner.follow().with_context(ends)
}

fn load_replica(
    options: &EngineOptions,
    replica: usize,
    progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<ModelRunner> {
    let runner = load_replica_uncaptured(options, replica, progress)?;
    captured(options, runner, progress)
}

/// Captures what the options say.
pub(crate) fn captured(
    options: &EngineOptions,
    mut runner: ModelRunner,
    progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<ModelRunner> {
    // With debug_cuda_graph the sizes of the ladder run eagerly, and nothing is captured.
    if options.graph_mode() == GraphMode::Ahead && !options.debug_cuda_graph {
        let mut stages = Stages::new(progress);
        let summary = runner.capture(&mut |done| stages.update(done))?;
        tracing::info!("{}", summary_line(&summary));
    } else {
        tracing::info!(mode = ?runner.options().graph, "no graphs captured ahead");
    }
    Ok(runner)
}

/// Loads the model and captures nothing.
///
/// # Errors
/// As [`start`].
pub fn load_uncaptured(options: &EngineOptions, progress: &mut dyn FnMut(Progress)) -> anyhow::Result<ModelRunner> {
    let refused = "`nnodes`: what captures graphs of its own runs in one process; drop it";
    anyhow::ensure!(options.nnodes == 1, refused);
    options.check_only_replica()?;
    load_replica_uncaptured(options, 0, progress)
}

fn load_replica_uncaptured(
    options: &EngineOptions,
    replica: usize,
    progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<ModelRunner> {
    options.check()?;
    let refused = "`disaggregation`: what runs one model alone has no roles; drop it";
    anyhow::ensure!(options.disaggregation.is_empty(), refused);
    let devices = open_devices(options, replica)?;
    let fitted = checked(options, devices[0].kind())?;
    logged(progress, |report| match &options.dist_init_addr {
        Some(at) => {
            let span = SpanOptions::new(options.nnodes, options.node_rank, at);
            ModelRunner::load_nodes(&devices, Some(span), &options.model, fitted, report)
        }
        None => ModelRunner::load_pipeline(&devices, options.pp, &options.model, fitted, report),
    })
}

/// Reads the model's configuration, refuses what does not fit it, and returns the runner's options.
pub(crate) fn checked(options: &EngineOptions, device: DeviceKind) -> anyhow::Result<ModelRunnerOptions> {
    let (folder, is_text) = (&options.model, !options.skip_tokenizer_init);
    let config = ModelConfig::load(folder)
        .with_context(|| format!("`model` {}: not a usable checkpoint folder", folder.display()))?;
    anyhow::ensure!(
        !is_text || folder.join("tokenizer.json").exists(),
        "`model` {}: has no tokenizer.json; add `skip_tokenizer_init` to work with token ids",
        folder.display()
    );
    let refused = || match options.ep {
        1 => format!("`tp` {}: the model cannot be divided so", options.tp),
        ep => format!("`ep` {ep}: the model cannot be divided so"),
    };
    registry::check_shard(&config, options.tp, options.experts()).with_context(refused)?;
    fit(options, &config, device)
}

/// Loads a runner, with a log line for each stage and one for all of it.
pub(crate) fn logged(
    progress: &mut dyn FnMut(Progress),
    load: impl FnOnce(&mut dyn FnMut(Progress)) -> bcg_models::Result<ModelRunner>,
) -> anyhow::Result<ModelRunner> {
    let began = Instant::now();
    let mut stages = Stages::new(progress);
    let runner = load(&mut |done| stages.update(done))?;
    tracing::info!(
        device = runner.device().name(),
        stages = runner.num_stages(),
        ranks = runner.num_ranks(),
        nodes = runner.world().num_nodes(),
        context_length = runner.options().context_length,
        kv_cache_tokens = runner.options().kv_cache_tokens,
        seconds = format_args!("{:.2}", began.elapsed().as_secs_f64()),
        "model loaded"
    );
    Ok(runner)
}

/// Logs how long each stage took, and passes on how far it is.
struct Stages<'a> {
    /// When the latest stage ended.
    began: Instant,
    progress: &'a mut dyn FnMut(Progress),
}

impl<'a> Stages<'a> {
    fn new(progress: &'a mut dyn FnMut(Progress)) -> Self {
        Self { began: Instant::now(), progress }
    }

    fn update(&mut self, progress: Progress) {
        (self.progress)(progress);
        if progress.done == progress.total {
            self.ended(progress.stage.name());
        }
    }

    /// Logs a stage's time, with all that happened since the stage before.
    fn ended(&mut self, name: &str) {
        let ms = self.began.elapsed().as_secs_f64() * 1e3;
        tracing::info!(ms = format_args!("{ms:.0}"), "{name}");
        self.began = Instant::now();
    }
}

/// Says in one line what was captured.
fn summary_line(summary: &CaptureSummary) -> String {
    let range = |sizes: &[usize], unit: &str| match sizes {
        [] => format!("no size ({unit})"),
        [only] => format!("1 size ({only} {unit})"),
        [first, .., last] => format!("{} sizes ({first}..{last} {unit})", sizes.len()),
    };
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    format!(
        "captured prefill: {}, {} segments and {} breaks each; decode: {}; in {:.2} s; {:.1} MiB of activations and \
         {:.1} MiB of graphs",
        range(&summary.prefill_sizes, "tokens"),
        summary.segments,
        summary.breaks,
        range(&summary.decode_sizes, "sequences"),
        summary.capture_time.as_secs_f64(),
        mib(summary.arena_bytes),
        mib(summary.graph_bytes),
    )
}

/// Opens the device that the option `device` names.
///
/// # Errors
/// If there is no usable GPU and one is asked for, or if the faults that `BCG_HOST_FAULT` asks for of a host device are none
/// ([`Device::host_from_env`]).
pub fn open_device(device: DeviceChoice) -> anyhow::Result<Device> {
    match device {
        DeviceChoice::Host => Ok(Device::host_from_env()?),
        DeviceChoice::Cuda => Device::cuda(0)
            .context("`device` cuda: no usable GPU; use `device` auto or `device` host to run without one"),
        DeviceChoice::Auto => {
            let (device, line) = Device::auto();
            tracing::info!("{line}");
            Ok(device)
        }
    }
}

/// Opens the device of each rank of a replica that lives in this process, as the options `device`, `tp`, `pp`, `dp`, `nnodes`
/// and `devices` say: that of rank `r` of stage `p` of replica `d` is number `(d * pp + p) * tp + r`. Of host devices, the
/// very first one has the faults that `BCG_HOST_FAULT` asks for.
///
/// # Errors
/// As [`open_device`]; if there are fewer usable GPUs than there are to be.
pub fn open_devices(options: &EngineOptions, replica: usize) -> anyhow::Result<Vec<Device>> {
    let gpu = |number: usize| {
        Device::cuda(number).with_context(|| match (&options.devices, options.dp) {
            (Some(_), _) => format!("`devices` {number}: this GPU cannot be used; name others"),
            (None, 1) if options.pp > 1 => format!(
                "`pp` {} with `tp` {}: GPU {number} cannot be used; lower them, or name one GPU several times in `devices`",
                options.pp, options.tp
            ),
            (None, 1) => format!(
                "`tp` {}: GPU {number} cannot be used; lower it, or name one GPU several times in `devices`",
                options.tp
            ),
            (None, dp) => format!(
                "`dp` {dp}: GPU {number} cannot be used; lower it, or say in `devices` which GPUs the replicas have"
            ),
        })
    };
    let first = replica * options.num_local_ranks();
    let named = |at: usize| options.devices.as_ref().and_then(|devices| devices.get(at)).copied();
    let host = |ordinal: usize| {
        let mut host = HostOptions::default();
        host.ordinal = ordinal;
        Device::host_with(host)
    };
    let mut devices = vec![match (named(first), options.device) {
        (Some(number), _) => gpu(number)?,
        (None, device) if first == 0 => open_device(device)?,
        (None, DeviceChoice::Host) => host(first),
        (None, DeviceChoice::Cuda) => gpu(first)?,
        // As the first replica chooses.
        (None, DeviceChoice::Auto) => match Device::auto().0.kind() {
            DeviceKind::Host => host(first),
            DeviceKind::Cuda => gpu(first)?,
        },
    }];
    for at in first + 1..first + options.num_local_ranks() {
        devices.push(match devices[0].kind() {
            DeviceKind::Cuda => gpu(named(at).unwrap_or(at))?,
            DeviceKind::Host => host(at),
        });
    }
    Ok(devices)
}

/// The runner's options: those of the engine, with what the model and the device decide.
fn fit(options: &EngineOptions, config: &ModelConfig, device: DeviceKind) -> anyhow::Result<ModelRunnerOptions> {
    let longest = config.max_position_embeddings;
    let mut context_length = options.context_length.unwrap_or(longest);
    if let (Some(tokens), None) = (options.kv_cache_tokens, options.context_length) {
        context_length = context_length.min(tokens);
    }
    let (kv_cache_tokens, mem_fraction_static) = kv_cache(options, config, device, context_length)?;
    let kv_cache_tokens = kv_cache_tokens.next_multiple_of(options.page_size);
    let fitted = options.runner_options(context_length, kv_cache_tokens, mem_fraction_static);
    fitted.validate(config)?;
    Ok(fitted)
}

/// Tokens of the KV cache, and the fraction of the memory that bounds them once all else has been measured.
fn kv_cache(
    options: &EngineOptions,
    config: &ModelConfig,
    device: DeviceKind,
    context_length: usize,
) -> anyhow::Result<(usize, Option<f64>)> {
    if let Some(tokens) = options.kv_cache_tokens {
        return Ok((tokens, None));
    }
    let useful = options.max_running_requests.saturating_mul(context_length);
    Ok(match (device, options.mem_fraction_static) {
        (DeviceKind::Host, None) => {
            let fits = HOST_KV_BYTES / config.cache_layout(Shard::WHOLE)?.kv_bytes_per_token(config.dtype).max(1);
            (fits.min(useful).max(context_length), None)
        }
        (_, fraction) => (useful, Some(fraction.unwrap_or(MEM_FRACTION_STATIC))),
    })
}

/// Returns the name of a checkpoint's folder.
pub fn folder_name(dir: &Path) -> String {
    let full = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    full.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_rank_opens_a_host_device_of_its_own() {
        let options = EngineOptions { device: DeviceChoice::Host, tp: 3, dp: 2, ..EngineOptions::new("m") };
        let names = |replica| -> Vec<String> {
            let devices = open_devices(&options, replica).expect("opens");
            devices.iter().map(|device| device.name().to_owned()).collect()
        };
        assert_eq!(names(0), ["host:0", "host:1", "host:2"]);
        assert_eq!(names(1), ["host:3", "host:4", "host:5"]);
    }

    #[test]
    fn the_summary_names_sizes_segments_breaks_time_and_memory() {
        let summary = CaptureSummary {
            prefill_sizes: vec![1, 2, 512],
            decode_sizes: vec![1],
            segments: 5,
            breaks: 4,
            capture_time: Duration::from_millis(830),
            arena_bytes: 5 << 20,
            graph_bytes: 3 << 19,
        };
        assert_eq!(
            summary_line(&summary),
            "captured prefill: 3 sizes (1..512 tokens), 5 segments and 4 breaks each; decode: 1 size (1 sequences); in \
             0.83 s; 5.0 MiB of activations and 1.5 MiB of graphs"
        );
    }
}
