//! The device's memory is shared out before the first request: whatever is served, nothing goes beyond the fraction.

use std::ops::ControlFlow;

use bcg_models::{GenerateOptions, GraphMode, ModelRunner, ModelRunnerOptions, Phase, SamplingParams, SequenceInput};
use bcg_runtime::{Device, HostOptions};
use bcg_tests::golden::{self, folder};

const MIB: usize = 1 << 20;
const FRACTION: f64 = 0.8;

fn options(graph: GraphMode) -> ModelRunnerOptions {
    ModelRunnerOptions { context_length: 512, chunked_prefill_size: 512, ..golden::options(graph) }
}

fn small_device(memory_bytes: usize) -> Device {
    Device::host_with({
        let mut options = HostOptions::default();
        options.memory_bytes = memory_bytes;
        options
    })
}

fn used_bytes(device: &Device) -> usize {
    let memory = device.memory_info().expect("memory");
    memory.total_bytes - memory.free_bytes
}

fn load(device: &Device, options: ModelRunnerOptions) -> bcg_models::Result<ModelRunner> {
    let options = ModelRunnerOptions { mem_fraction_static: Some(FRACTION), kv_cache_tokens: 1 << 24, ..options };
    ModelRunner::load(device, &folder("tiny-qwen3"), options, &mut |_| ())
}

/// Runs prompts of some lengths, each with some tokens of answer.
fn serve(runner: &mut ModelRunner, lens: impl IntoIterator<Item = usize>) {
    let mut options = GenerateOptions::new(3, SamplingParams { temperature: 1.0, ..SamplingParams::greedy() });
    options.ignore_eos = true;
    for len in lens {
        let prompt: Vec<u32> = (0..len as u32).map(|token| token % 500).collect();
        runner.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).expect("an answer");
    }
}

/// Runs a prompt beside a decode, in steps of these many rows.
fn serve_mixed(runner: &mut ModelRunner, steps: impl IntoIterator<Item = usize>) {
    let (pool, greedy) = (runner.pages().clone(), SamplingParams::greedy());
    for rows in steps {
        let decode = pool.lease(pool.pages_for(11)).expect("pages");
        let prompt = pool.lease(pool.pages_for(rows)).expect("pages");
        let tokens = vec![7; rows];
        let batch = [
            SequenceInput::new(&tokens[..1], 10, decode.pages(), &greedy),
            SequenceInput::new(&tokens[1..], 0, prompt.pages(), &greedy),
        ];
        for _ in 0..2 {
            runner.step(&batch).expect("a step");
        }
    }
}

#[test]
fn weights_activations_graphs_and_kv_cache_stay_within_the_fraction() {
    let lazy = ModelRunnerOptions {
        cuda_graph_sizes: None,
        cuda_graph_lazy_max_graphs: 12,
        cuda_graph_lazy_max_mib: 1,
        ..options(GraphMode::Lazy)
    };
    for options in [options(GraphMode::Off), options(GraphMode::Ahead), lazy] {
        let device = small_device(192 * MIB);
        let fraction_bytes = (FRACTION * 192.0 * MIB as f64) as usize;
        let mut runner = load(&device, options.clone()).expect("it fits");
        runner.capture(&mut |_| ()).expect("every size is captured");
        let loaded = used_bytes(&device);
        serve(&mut runner, (1..16).chain([300]));
        serve_mixed(&mut runner, [3, 4, 6, 8, 39, 40, 63, 64, 399, 400, 447, 448, 512]);
        let served = used_bytes(&device);
        assert!(served <= fraction_bytes, "{} of {fraction_bytes} bytes with {:?}", served, options.graph);
        if options.graph == GraphMode::Lazy {
            assert!(runner.stats().num_evictions > 0 && served > loaded, "{:?}", runner.stats());
            continue;
        }
        // A padded replay adds executables that scrub; they were counted.
        assert!(served == loaded || options.graph == GraphMode::Ahead, "nothing grows while serving");
        let unused = fraction_bytes - served;
        assert!(unused < MIB, "{unused} bytes of the fraction stay unused");
    }
}

#[test]
fn the_kv_cache_and_its_pages_have_one_size() {
    let device = small_device(192 * MIB);
    let runner = load(&device, options(GraphMode::Ahead)).expect("it fits");
    let num_pages = runner.kv_cache().num_pages();
    assert_eq!((runner.pages().num_pages(), runner.options().kv_cache_tokens), (num_pages, num_pages * 16));
    assert!(runner.describe(Phase::Prefill, 448).is_none(), "the measured graphs are gone");
    assert_eq!((runner.stats(), runner.graph_bytes()), (Default::default(), 0));
}

#[test]
fn too_little_memory_names_the_option_and_the_remedy() {
    let error = |memory_bytes: usize, options: ModelRunnerOptions| match load(&small_device(memory_bytes), options) {
        Ok(_) => panic!("{memory_bytes} bytes are too little"),
        Err(error) => error.to_string(),
    };
    let small = error(44 * MIB, options(GraphMode::Ahead));
    assert!(small.contains("mem_fraction_static") && small.contains("or lower context_length"), "{small}");
    let large_steps =
        ModelRunnerOptions { chunked_prefill_size: 1 << 14, max_running_requests: 1024, ..options(GraphMode::Off) };
    let error_of_steps = error(44 * MIB, large_steps);
    assert!(error_of_steps.contains("chunked_prefill_size") && error_of_steps.contains("lower it"), "{error_of_steps}");
    let lazy = ModelRunnerOptions { cuda_graph_lazy_max_mib: 0, ..options(GraphMode::Lazy) };
    let lazy = error(192 * MIB, lazy);
    assert!(lazy.contains("cuda_graph_lazy_max_mib") && lazy.contains("raise it"), "{lazy}");
}
