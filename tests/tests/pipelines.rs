//! Models whose layers are divided among the stages of a pipeline, on host devices, and engines that serve them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bcg_engine::local::LocalEngine;
use bcg_engine::{DeviceChoice, Engine, EngineEvent, EngineOptions, EventStream, GenerationRequest, Prompt, load};
use bcg_models::{GraphMode, ModelRunner};
use bcg_runtime::{Device, HostControl, HostOptions};
use bcg_tests::golden;

/// Devices whose work runs in orders of their own.
fn hosts(count: usize) -> Vec<Device> {
    let host = |at: usize| {
        let mut options = HostOptions::default();
        (options.seed, options.ordinal) = (at as u64, at);
        Device::host_with(options)
    };
    (0..count).map(host).collect()
}

#[test]
fn qwen3_in_two_stages_computes_what_one_stage_does() {
    golden::a_pipeline_computes_what_one_stage_does_on_every_path(&hosts(2), 2, "tiny-qwen3");
}

#[test]
fn nemotron_h_in_three_stages_computes_what_one_stage_does() {
    golden::a_pipeline_computes_what_one_stage_does_on_every_path(&hosts(3), 3, "tiny-nemotron-h");
}

#[test]
fn deepseek_v3_in_two_stages_computes_what_one_stage_does() {
    golden::a_pipeline_computes_what_one_stage_does_on_every_path(&hosts(2), 2, "tiny-deepseek-v3");
}

#[test]
fn qwen3_moe_in_two_stages_of_two_ranks_computes_what_one_stage_does() {
    golden::a_pipeline_computes_what_one_stage_does_on_every_path(&hosts(4), 2, "tiny-qwen3-moe");
}

#[test]
fn steps_of_two_stages_overlap() {
    let rule = golden::steps_in_all_stages_at_once_choose_the_tokens_of_steps_one_by_one;
    rule(&hosts(2), 2, "tiny-qwen3-moe", GraphMode::Ahead);
}

#[test]
fn steps_of_three_stages_overlap() {
    let rule = golden::steps_in_all_stages_at_once_choose_the_tokens_of_steps_one_by_one;
    rule(&hosts(3), 3, "tiny-nemotron-h", GraphMode::Off);
}

#[test]
fn a_pipeline_refuses_a_step_too_many_and_goes_on() {
    golden::a_pipeline_refuses_a_step_too_many_and_goes_on(&hosts(2), 2, "tiny-qwen3");
}

#[test]
fn a_pipeline_solves_what_one_device_solves() {
    golden::a_pipeline_solves_what_one_device_solves(&hosts(2), 2, "tiny-qwen3");
}

#[test]
fn stages_that_cannot_be_are_refused() {
    golden::CHECKPOINTS.iter().for_each(|checkpoint| golden::stages_that_cannot_be_are_refused(checkpoint));
}

/// Requests at once, all of which a step holds.
const REQUESTS: u32 = 4;

/// An engine of two stages, with the controls of its devices, and how often it has loaded its model.
struct Served {
    engine: LocalEngine,
    controls: Arc<Mutex<Vec<HostControl>>>,
    loads: Arc<AtomicUsize>,
}

impl Served {
    fn start(tp: usize) -> Self {
        let mut options = EngineOptions::new(golden::folder("tiny-qwen3"));
        (options.device, options.tp, options.pp) = (DeviceChoice::Host, tp, 2);
        (options.context_length, options.max_running_requests) = (Some(256), REQUESTS as usize);
        options.enable_breakable_cuda_graph = true;
        options.cuda_graph_sizes = Some(vec![32]);
        let (controls, loads) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (of_devices, counted) = (Arc::clone(&controls), Arc::clone(&loads));
        let engine = load::start_with(
            &options,
            |_| (),
            move |runner: ModelRunner| {
                counted.fetch_add(1, Ordering::SeqCst);
                *of_devices.lock().expect("no panic") =
                    runner.devices().filter_map(Device::host_control).cloned().collect();
                Ok(runner)
            },
        );
        Self { engine: engine.expect("starts"), controls, loads }
    }

    fn ask(&self, at: u32) -> EventStream {
        let mut request = GenerationRequest::greedy(Prompt::Tokens((0..10 + at).map(|token| 8 + 7 * token).collect()));
        (request.max_tokens, request.ignore_eos) = (Some(60), true);
        self.engine.submit(request).expect("accepted")
    }

    /// Breaks a device while all requests decode; returns their errors, and how long they waited for them.
    fn broken(&self, device: usize, fault: &str) -> (Vec<String>, Duration) {
        let steps = self.engine.num_steps();
        let streams: Vec<_> = (0..REQUESTS).map(|at| self.ask(at)).collect();
        while self.engine.num_steps() < steps + 8 {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.controls.lock().expect("no panic")[device].inject(fault).expect("a fault");
        let begun = Instant::now();
        let errors = streams.into_iter().map(|stream| tokens(stream).expect_err("it fails"));
        (errors.collect(), begun.elapsed())
    }
}

fn tokens(mut stream: EventStream) -> Result<Vec<u32>, String> {
    let (mut tokens, mut end) = (Vec::new(), None);
    while let Some(event) = stream.next_blocking() {
        assert!(end.is_none(), "it ends once");
        match event {
            EngineEvent::Delta(delta) => tokens.extend(delta.tokens),
            EngineEvent::Finished { .. } => end = Some(Ok(())),
            EngineEvent::Failed(error) => end = Some(Err(error.to_string())),
        }
    }
    end.expect("it ends").map(|()| tokens)
}

#[test]
fn a_device_that_fails_in_any_stage_fails_what_runs_and_the_model_is_loaded_anew() {
    for stage in 0..2 {
        let served = Served::start(1);
        let before = tokens(served.ask(1)).expect("an answer");
        let (errors, took) = served.broken(stage, "fail:cuLaunchKernel:2");
        assert!(errors.iter().all(|error| error.contains("cuLaunchKernel")), "stage {stage}: {errors:?}");
        assert!(took < Duration::from_secs(10), "stage {stage}: {took:?}"); // a busy machine may be slow
        assert_eq!(tokens(served.ask(1)).expect("an answer"), before, "stage {stage}");
        assert_eq!(served.loads.load(Ordering::SeqCst), 2, "stage {stage}");
    }
}

#[test]
fn a_rank_that_panics_in_the_second_stage_is_named_and_the_model_is_loaded_anew() {
    let served = Served::start(2);
    let before = tokens(served.ask(1)).expect("an answer");
    let (errors, _) = served.broken(3, "panic:cuLaunchKernel:2");
    let says = ["rank 3 is lost", "the panic that was asked for"];
    assert!(errors.iter().all(|error| says.iter().all(|part| error.contains(part))), "{errors:?}");
    assert_eq!(tokens(served.ask(1)).expect("an answer"), before);
    assert_eq!(served.loads.load(Ordering::SeqCst), 2);
}
