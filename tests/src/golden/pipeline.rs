//! A checkpoint whose layers are divided among the stages of a pipeline: the bits of one stage on every path, with as many
//! steps under way as there are stages.

use std::collections::VecDeque;

use bcg_models::{
    ChosenToken, GraphMode, ModelRunner, ModelRunnerOptions, OptionError, PendingStep, SamplingParams, SequenceInput,
};
use bcg_runtime::Device;

use super::checkpoint::{answer, input, reference, tokens_of};
use super::eval::{Style, accuracy};
use super::{Checkpoint, folder, options};

/// Problems that a pipeline solves.
const NUM_PROBLEMS: usize = 12;

/// A tiny checkpoint, loaded as a pipeline and, where graphs are captured ahead, captured.
pub fn load_pipeline(
    devices: &[Device],
    num_stages: usize,
    checkpoint: Checkpoint,
    options: ModelRunnerOptions,
) -> ModelRunner {
    let runner = ModelRunner::load_pipeline(devices, num_stages, &folder(checkpoint), options, &mut |_| ());
    let mut runner = runner.expect("the tiny checkpoint loads");
    runner.capture(&mut |_| ()).expect("every size is captured");
    runner
}

/// Eagerly, healed, captured lazily with every replay verified and freed memory poisoned: greedy and drawn tokens, and the
/// logits of every token of a prompt, are those of one stage with as many ranks.
pub fn a_pipeline_computes_what_one_stage_does_on_every_path(
    devices: &[Device],
    num_stages: usize,
    checkpoint: Checkpoint,
) {
    let prompt = tokens_of(&reference(checkpoint)[0]);
    let drawn = SamplingParams { temperature: 3.0, top_k: Some(200), top_p: 0.99, min_p: 0.0, seed: 11 };
    let answers = |runner: &mut ModelRunner| -> Vec<Vec<u32>> {
        [SamplingParams::greedy(), drawn].map(|sampling| answer(runner, &prompt, sampling)).into()
    };
    let logits = |runner: &mut ModelRunner| -> Vec<Vec<f32>> {
        let (pool, greedy) = (runner.pages().clone(), SamplingParams::greedy());
        let lease = pool.lease(pool.pages_for(prompt.len())).expect("free pages");
        runner.score(&input(&prompt, 0, &lease, &greedy)).expect("logits")
    };
    let mut one_stage = load_pipeline(&devices[..devices.len() / num_stages], 1, checkpoint, options(GraphMode::Off));
    let expected = (answers(&mut one_stage), logits(&mut one_stage));
    drop(one_stage);
    for mode in [GraphMode::Off, GraphMode::Ahead, GraphMode::Lazy] {
        let mut options = options(mode);
        if mode == GraphMode::Lazy {
            (options.verify_graph, options.poison_graph_memory) = (Some(1), true);
        }
        let mut runner = load_pipeline(devices, num_stages, checkpoint, options);
        assert_eq!((runner.num_stages(), runner.devices().count()), (num_stages, devices.len()));
        assert_eq!((answers(&mut runner), logits(&mut runner)), expected, "{mode:?}");
        let stats = runner.stats();
        assert!(mode == GraphMode::Off || stats.num_replays >= 20, "{stats:?}");
        assert!(mode != GraphMode::Lazy || stats.num_verified == stats.num_replays, "{stats:?}");
        assert_eq!(stats.num_capture_failures, 0, "{stats:?}");
    }
}

/// Tokens generated for each prompt.
const GENERATED: usize = 6;

/// Sequences that decode in turn, with as many steps under way as there are stages, each of which takes a token that nobody
/// has read, of the step before or of an earlier one: in whatever order the devices run, and whichever of them are late.
pub fn steps_in_all_stages_at_once_choose_the_tokens_of_steps_one_by_one(
    devices: &[Device],
    num_stages: usize,
    checkpoint: Checkpoint,
    mode: GraphMode,
) {
    let prompts: Vec<Vec<u32>> = reference(checkpoint).iter().cycle().take(num_stages).map(tokens_of).collect();
    let mut runner = load_pipeline(devices, num_stages, checkpoint, options(mode));
    for per_turn in [1, num_stages] {
        let expected = in_turn(&mut runner, &prompts[..per_turn], false);
        for late_devices in 0..1 << devices.len() {
            for (at, control) in devices.iter().filter_map(Device::host_control).enumerate() {
                control.reseed(late_devices * 31 + at as u64);
                control.set_delay("model", late_devices >> at & 1 == 1);
            }
            let got = in_turn(&mut runner, &prompts[..per_turn], true);
            assert_eq!(got, expected, "{per_turn} in turn, late devices {late_devices:b}");
        }
    }
}

/// Generates with a step for each sequence in turn, read at once or as late as may be.
fn in_turn(runner: &mut ModelRunner, prompts: &[Vec<u32>], late: bool) -> Vec<Vec<u32>> {
    let (pool, num_stages) = (runner.pages().clone(), runner.num_stages());
    let room = |prompt: &Vec<u32>| pool.pages_for(prompt.len() + GENERATED);
    let leases: Vec<_> = prompts.iter().map(|prompt| pool.lease(room(prompt)).expect("free pages")).collect();
    let sampling = SamplingParams { seed: 5, ..SamplingParams::default() };
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut under_way: VecDeque<(PendingStep, usize)> = VecDeque::new();
    for step in 0..GENERATED * prompts.len() {
        let (at, round) = (step % prompts.len(), step / prompts.len());
        let is_unread = answers[at].len() < round;
        let tokens: &[u32] = match round {
            0 => &prompts[at],
            _ if is_unread => &[],
            _ => &answers[at][round - 1..],
        };
        let past_len = if round == 0 { 0 } else { prompts[at].len() + round - 1 };
        let chosen = is_unread.then(|| ChosenToken { steps_since: prompts.len() - 1, row: 0 });
        let input = SequenceInput::new(tokens, past_len, leases[at].pages(), &sampling);
        let input = SequenceInput { chosen, state: leases[at].state(), num_drawn: round as u64, ..input };
        under_way.push_back((runner.launch(&[input]).expect("launched"), at));
        while under_way.len() > if late { num_stages } else { 0 } {
            read(runner, &mut under_way, &mut answers);
        }
    }
    while !under_way.is_empty() {
        read(runner, &mut under_way, &mut answers);
    }
    answers
}

fn read(runner: &mut ModelRunner, under_way: &mut VecDeque<(PendingStep, usize)>, answers: &mut [Vec<u32>]) {
    let Some((pending, at)) = under_way.pop_front() else { return };
    answers[at].push(runner.collect(pending).expect("collected").tokens[0].id);
}

/// Batches that cannot be run, steps that nobody collects, a step too many, and a token of a step that is long over break
/// nothing.
pub fn a_pipeline_refuses_a_step_too_many_and_goes_on(devices: &[Device], num_stages: usize, checkpoint: Checkpoint) {
    let prompt = tokens_of(&reference(checkpoint)[0]);
    let mut runner = load_pipeline(devices, num_stages, checkpoint, options(GraphMode::Off));
    let expected = answer(&mut runner, &prompt, SamplingParams::greedy());
    let (pool, greedy) = (runner.pages().clone(), SamplingParams::greedy());
    let lease = pool.lease(pool.pages_for(prompt.len() + 1)).expect("pages");
    let batch = [input(&prompt, 0, &lease, &greedy)];
    let pending: Vec<_> = (0..=num_stages).map(|_| runner.launch(&batch).expect("a step")).collect();
    let error = runner.launch(&batch).expect_err("a step too many").to_string();
    assert!(error.contains(&format!("at most {} not collected", num_stages + 1)), "{error}");
    drop(pending);
    let late = ChosenToken { steps_since: num_stages, row: 0 };
    let late = SequenceInput { chosen: Some(late), ..input(&[], prompt.len(), &lease, &greedy) };
    let error = runner.launch(&[late]).expect_err("a token that is gone").to_string();
    assert!(error.contains("chosen token of a sequence"), "{error}");
    assert_eq!(answer(&mut runner, &prompt, SamplingParams::greedy()), expected);
}

/// As many problems are right as with one device, and token for token the same.
pub fn a_pipeline_solves_what_one_device_solves(devices: &[Device], num_stages: usize, checkpoint: Checkpoint) {
    let solve = |devices: &[Device], num_stages| {
        let mut runner = load_pipeline(devices, num_stages, checkpoint, options(GraphMode::Ahead));
        accuracy(&mut runner, checkpoint, Style::Chat, NUM_PROBLEMS)
    };
    let one = solve(&devices[..1], 1);
    assert_eq!(solve(devices, num_stages), one);
    assert_eq!(one.0, 1.0);
}

/// More stages than layers, and devices that the stages cannot share out, are refused by the option's name.
pub fn stages_that_cannot_be_are_refused(checkpoint: Checkpoint) {
    let devices: Vec<Device> = (0..9).map(|_| Device::host()).collect();
    let refused = |devices: &[Device], num_stages| {
        let options = options(GraphMode::Off);
        let loaded = ModelRunner::load_pipeline(devices, num_stages, &folder(checkpoint), options, &mut |_| ());
        match loaded.expect_err("refused") {
            bcg_models::Error::Option(OptionError { option: "pp", problem, .. }) => problem,
            other => panic!("{other}"),
        }
    };
    assert!(refused(&devices, 9).contains("layers for 9 stages"));
    assert!(refused(&devices[..3], 2).contains("equally many of 3 devices"));
    assert!(refused(&devices[..1], 0).contains("0 stages"));
}
