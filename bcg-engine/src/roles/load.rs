//! From options to a pair of roles: the decode role first, whose caches the prefill role pushes to.

use anyhow::Context as _;
use bcg_models::weights::Shard;
use bcg_models::{ModelRunner, ModelRunnerOptions, Phase, Progress, Role};
use bcg_runtime::{Device, DeviceKind, HostOptions};
use serde_json::json;

use super::super::load::{self, Loader};
use super::super::local::LocalEngine;
use super::super::model::StepModel;
use super::super::options::{DeviceChoice, EngineOptions};
use super::super::prefix_cache::PrefixCache;
use super::{MovedBytes, Roles};

/// As [`load::start_with`](super::super::load::start_with), with prefill and decode on these GPUs.
pub(crate) fn start_with<M: StepModel + Send>(
    loader: Loader,
    gpus: [usize; 2],
    mut progress: impl FnMut(Progress) + Send + 'static,
    mut model: impl FnMut(ModelRunner) -> anyhow::Result<M> + Send + 'static,
) -> anyhow::Result<LocalEngine> {
    LocalEngine::start_roles(move || {
        let [prefill, decode] = load_pair(loader.options(), gpus, &mut progress)?;
        let (limits, has_prefix_cache, mut local) = loader.describe(&prefill)?;
        let roles = [("prefill", &prefill), ("decode", &decode)].map(|(name, runner)| {
            (name, json!({ "device": runner.device().name(), "kv_cache_pages": runner.pages().num_pages() }))
        });
        local.settings["roles"] = roles.into_iter().collect();
        local.settings["devices"] = json!([prefill.device().name(), decode.device().name()]);
        local.settings["decode_graph_sizes"] = json!(decode.graph_sizes(Phase::Decode));
        let layout = prefill.config().cache_layout(Shard::WHOLE)?;
        let dtype = prefill.config().dtype;
        let bytes = MovedBytes {
            per_token: layout.kv_bytes_per_token(dtype),
            per_state: layout.states.as_ref().map_or(0, |states| states.bytes_per_slot(dtype)),
        };
        let (cache, pool) = (PrefixCache::new(prefill.pages().clone(), has_prefix_cache), decode.pages().clone());
        Ok((Roles::new([model(prefill)?, model(decode)?], limits, cache, pool, bytes), local))
    })
}

/// Loads and captures the model twice: that of the prefill role, and that of the decode role.
fn load_pair(
    options: &EngineOptions,
    gpus: [usize; 2],
    progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<[ModelRunner; 2]> {
    let [near, far] = open_devices(options, gpus)?;
    let is_shared = near.kind() == DeviceKind::Cuda && gpus[0] == gpus[1];
    anyhow::ensure!(
        !is_shared || options.kv_cache_tokens.is_some(),
        "`disaggregation`: both roles are on GPU {}, whose memory is not divided between them; give `kv_cache_tokens`, \
         for each of them",
        gpus[0]
    );
    let fitted = load::checked(options, near.kind())?;
    let mut load = |device: &Device, fitted, role| {
        let runner =
            load::logged(progress, |progress| ModelRunner::load_role(device, &options.model, fitted, role, progress))?;
        load::captured(options, runner, progress)
    };
    // Text is the business of the prefill role.
    let of_decode = ModelRunnerOptions { skip_tokenizer_init: true, ..fitted.clone() };
    let decode = load(&far, of_decode, Role::Decode { prefill: near.clone() }).context("the decode role")?;
    let role = Role::Prefill { decode: decode.caches().clone() };
    Ok([load(&near, fitted, role).context("the prefill role")?, decode])
}

/// Opens the device of each role. Of host devices, that of the prefill role has the faults that `BCG_HOST_FAULT` asks for.
fn open_devices(options: &EngineOptions, gpus: [usize; 2]) -> anyhow::Result<[Device; 2]> {
    let is_host = match options.device {
        DeviceChoice::Host => true,
        DeviceChoice::Cuda => false,
        DeviceChoice::Auto => Device::auto().0.kind() == DeviceKind::Host,
    };
    if is_host {
        let mut second = HostOptions::default();
        second.ordinal = 1;
        return Ok([load::open_device(DeviceChoice::Host)?, Device::host_with(second)]);
    }
    let gpu = |number| {
        let refused = || format!("`disaggregation`: GPU {number} cannot be used; name another one");
        Device::cuda(number).with_context(refused)
    };
    Ok([gpu(gpus[0])?, gpu(gpus[1])?])
}
