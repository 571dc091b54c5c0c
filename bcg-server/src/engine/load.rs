//! From checked flags to a running engine: device, sizes, weights, graphs.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use bcg_models::{ChatTemplate, GraphMode, LoadFormat, ModelConfig, ModelRunner, Phase, RunnerOptions};
use bcg_runtime::{Device, DeviceKind};
use serde_json::{Value, json};

use super::ModelInfo;
use super::local::{LocalEngine, LocalOptions};
use super::prefix_cache::PrefixCache;
use super::scheduler::{Limits, Scheduler};
use crate::args::{DeviceArg, EnginePlan, GraphPlan, LoadFormatArg};
use crate::progress::LoadProgress;

/// The part of a GPU's memory for weights, activations, graphs and KV cache. The rest is left to kernels that are loaded
/// later, and to other processes.
const MEM_FRACTION_STATIC: f64 = 0.9;

/// KV cache bytes on the host device when no flag says how many tokens it holds.
const HOST_KV_BYTES: usize = 128 << 20;

/// Loads the model on the engine's thread and returns the engine once it serves.
///
/// `name` is the model's name in the API; without one it is the checkpoint folder's.
///
/// # Errors
/// What is wrong with the checkpoint, the flags or the device.
pub fn start(plan: &EnginePlan, name: Option<String>) -> anyhow::Result<LocalEngine> {
    let plan = plan.clone();
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let name = name.unwrap_or_else(|| folder_name(&plan.model));
    LocalEngine::start(move || {
        let runner = load_runner(&plan)?;
        let chat = if plan.skip_tokenizer { None } else { ChatTemplate::load(&plan.model)? };
        let options = runner.options();
        let limits = Limits {
            max_running: options.max_running_requests,
            max_batch_tokens: options.max_batch_tokens,
            context_length: options.context_length,
        };
        // A state stands for all tokens before it and cannot be turned back to where a prefix ends.
        let has_states = !runner.states().layers().is_empty();
        let has_prefix_cache = !plan.disable_radix_cache && !has_states;
        if has_states && !plan.disable_radix_cache {
            tracing::info!("no prefix cache: the model has state-space layers");
        }
        let info = ModelInfo {
            name: name.clone(),
            created,
            context_length: limits.context_length,
            vocab_size: runner.config().vocab_size,
            has_tokenizer: !plan.skip_tokenizer,
        };
        let local = LocalOptions {
            info,
            tokenizer: runner.tokenizer().ok().cloned(),
            chat,
            eos: runner.config().eos_token_ids.clone(),
            max_queued: plan.max_queued,
            settings: settings(&plan, &runner, has_prefix_cache),
        };
        let scheduler = Scheduler::new(limits, PrefixCache::new(runner.pages().clone(), has_prefix_cache));
        Ok((runner, scheduler, local))
    })
}

/// What an operator may want to know of a running engine.
fn settings(plan: &EnginePlan, runner: &ModelRunner, has_prefix_cache: bool) -> Value {
    let options = runner.options();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "device": runner.device().name(),
        "architecture": runner.config().architecture,
        "model_path": plan.model.display().to_string(),
        "page_size": options.page_size,
        "kv_cache_pages": runner.pages().num_pages(),
        "max_running_requests": options.max_running_requests,
        "chunked_prefill_size": options.max_batch_tokens,
        "radix_cache": has_prefix_cache,
        "graph_mode": format!("{:?}", options.graph).to_lowercase(),
        "prefill_graph_sizes": runner.graph_sizes(Phase::Prefill),
        "decode_graph_sizes": runner.graph_sizes(Phase::Decode),
    })
}

/// Loads the model and captures its graphs, with progress bars and a summary line.
///
/// # Errors
/// As [`start`].
pub fn load_runner(plan: &EnginePlan) -> anyhow::Result<ModelRunner> {
    let mut progress = LoadProgress::new();
    let mut runner = load_uncaptured(plan, &mut progress)?;
    let captured = match plan.graph {
        GraphPlan::Ahead => Some(runner.capture(&mut |done| progress.update(done))?),
        GraphPlan::Off | GraphPlan::Lazy => None,
    };
    progress.finish(&runner, captured.as_ref());
    Ok(runner)
}

/// Loads the model and captures nothing.
///
/// # Errors
/// As [`start`].
pub fn load_uncaptured(plan: &EnginePlan, progress: &mut LoadProgress) -> anyhow::Result<ModelRunner> {
    let device = open_device(plan.device)?;
    progress.stage_ended("opening the device");
    let config = ModelConfig::load(&plan.model)
        .with_context(|| format!("--model {}: not a usable checkpoint folder", plan.model.display()))?;
    anyhow::ensure!(
        plan.skip_tokenizer || plan.model.join("tokenizer.json").exists(),
        "--model {}: has no tokenizer.json; add --skip-tokenizer-init to work with token ids",
        plan.model.display()
    );
    let options = runner_options(plan, &config, &device)?;
    Ok(ModelRunner::load(&device, &plan.model, options, &mut |done| progress.update(done))?)
}

/// Opens the device that `--device` names.
///
/// # Errors
/// If there is no usable GPU and one is asked for.
pub fn open_device(device: DeviceArg) -> anyhow::Result<Device> {
    match device {
        DeviceArg::Host => Ok(Device::host()),
        DeviceArg::Cuda => Device::cuda(0)
            .context("--device cuda: no usable GPU; use --device auto or --device host to run without one"),
        DeviceArg::Auto => {
            let (device, line) = Device::auto();
            tracing::info!("{line}");
            Ok(device)
        }
    }
}

fn runner_options(plan: &EnginePlan, config: &ModelConfig, device: &Device) -> anyhow::Result<RunnerOptions> {
    let longest = config.max_position_embeddings;
    let mut context_length = plan.context_length.unwrap_or(longest);
    anyhow::ensure!(
        context_length <= longest,
        "--context-length: {context_length} is above the model's {longest} positions; lower it or drop it"
    );
    if let (Some(tokens), None) = (plan.kv_cache_tokens, plan.context_length) {
        context_length = context_length.min(tokens);
    }
    let (kv_cache_tokens, mem_fraction_static) = kv_cache(plan, config, device.kind(), context_length)?;
    let default = RunnerOptions::default();
    Ok(RunnerOptions {
        load_format: match plan.load_format {
            LoadFormatArg::Auto => LoadFormat::Auto,
            LoadFormatArg::Dummy => LoadFormat::Dummy,
        },
        skip_tokenizer: plan.skip_tokenizer,
        page_size: plan.page_size,
        kv_cache_tokens: kv_cache_tokens.next_multiple_of(plan.page_size),
        mem_fraction_static,
        max_running_requests: plan.max_running,
        context_length,
        max_batch_tokens: plan.max_batch_tokens,
        graph: match plan.graph {
            GraphPlan::Off => GraphMode::Off,
            GraphPlan::Ahead => GraphMode::Ahead,
            GraphPlan::Lazy => GraphMode::Lazy,
        },
        graph_sizes: plan.graph_sizes.clone(),
        decode_graph_sizes: plan.decode_graph_sizes.clone(),
        graph_max_tokens: plan.graph_max_tokens.unwrap_or(default.graph_max_tokens),
        lazy_graphs_max: plan.lazy_graphs_max.unwrap_or(default.lazy_graphs_max),
        lazy_graph_bytes_max: plan.lazy_graph_bytes_max.unwrap_or(default.lazy_graph_bytes_max),
        debug_graph: plan.debug_graph,
        verify_graph: plan.verify_graph,
        poison: plan.poison,
    })
}

/// Tokens of the KV cache, and the fraction of the memory that bounds them once all else has been measured.
fn kv_cache(
    plan: &EnginePlan,
    config: &ModelConfig,
    device: DeviceKind,
    context_length: usize,
) -> anyhow::Result<(usize, Option<f64>)> {
    if let Some(tokens) = plan.kv_cache_tokens {
        return Ok((tokens, None));
    }
    let useful = plan.max_running.saturating_mul(context_length);
    Ok(match (device, plan.mem_fraction_static) {
        (DeviceKind::Host, None) => {
            let fits = HOST_KV_BYTES / config.cache_layout()?.kv_bytes_per_token(config.dtype).max(1);
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
