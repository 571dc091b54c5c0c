//! A tiny checkpoint: logits against the reference, and equal results on every path to them.

use std::ops::ControlFlow;

use bcg_models::state::PageLease;
use bcg_models::{
    Error, GenerateOptions, GraphMode, LoadFormat, ModelRunner, ModelRunnerOptions, Phase, SamplingParams,
    SequenceInput,
};
use bcg_runtime::{Device, DeviceKind};
use serde_json::Value;

use super::{Checkpoint, folder, load, options};

/// The relative spacing of bf16 numbers, and how far logits may lie from the f32 reference: rounding once in every op.
const BF16_EPSILON: f32 = 1.0 / 256.0;
const ABSOLUTE: f32 = 0.06;
const RELATIVE: f32 = 4.0 * BF16_EPSILON;
/// Where bf16 swaps the two best logits, the wrong one leads by no more than this. transformers in bf16 goes as far.
const NEAR_TIE: f32 = 0.55;

pub(super) fn input<'a>(
    tokens: &'a [u32],
    past_len: usize,
    lease: &'a PageLease,
    sampling: &'a SamplingParams,
) -> SequenceInput<'a> {
    let (pages, state) = (lease.pages(), lease.state());
    SequenceInput { state, logits: true, ..SequenceInput::new(tokens, past_len, pages, sampling) }
}

/// Runs `tokens` in steps that end at `ends`, and returns the logits after the last one.
fn logits_in_steps(runner: &mut ModelRunner, tokens: &[u32], ends: &[usize]) -> Vec<f32> {
    let pool = runner.pages().clone();
    let lease = pool.lease(pool.pages_for(tokens.len())).expect("free pages");
    let greedy = SamplingParams::greedy();
    let mut logits = None;
    let mut begin = 0;
    for &end in ends {
        let mut output = runner.step(&[input(&tokens[begin..end], begin, &lease, &greedy)]).expect("a step");
        logits = output.tokens.remove(0).logits;
        begin = end;
    }
    logits.expect("logits were asked for")
}

pub(super) fn reference(checkpoint: Checkpoint) -> Vec<Value> {
    let bytes = std::fs::read(folder(checkpoint).join("reference_logits.json")).expect("the reference");
    let mut reference: Value = serde_json::from_slice(&bytes).expect("JSON");
    let Value::Array(cases) = reference["cases"].take() else { panic!("cases") };
    cases
}

fn numbers<T>(value: &Value, convert: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    value.as_array().expect("a list").iter().map(|number| convert(number).expect("a number")).collect()
}

pub(super) fn tokens_of(case: &Value) -> Vec<u32> {
    numbers(&case["ids"], |id| id.as_u64().map(|id| id as u32))
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("logits") as u32
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (token, (got, expected)) in got.iter().zip(expected).enumerate() {
        let tolerance = ABSOLUTE + expected.abs() * RELATIVE;
        assert!((got - expected).abs() <= tolerance, "{what}: token {token}: {got} is not {expected} ± {tolerance}");
    }
}

/// Asserts that one thing was computed in two ways. Where the batches had different numbers of rows, only the host device
/// gives the same bits: on CUDA a matrix product may then sum in another order, so the logits are near, and choose the same
/// token.
#[track_caller]
fn assert_same(device: &Device, got: &[f32], expected: &[f32], what: &str) {
    if device.kind() == DeviceKind::Host {
        assert_eq!(got, expected, "{what}");
    }
    assert_close(got, expected, what);
    assert_eq!(argmax(got), argmax(expected), "{what}");
}

/// The last logits lie within bf16 rounding of the reference, and every position has its most likely token.
pub fn logits_match_the_reference(device: &Device, checkpoint: Checkpoint) {
    match_the_reference(&mut load(device, checkpoint, options(GraphMode::Off)), checkpoint);
}

pub(super) fn match_the_reference(runner: &mut ModelRunner, checkpoint: Checkpoint) {
    let greedy = SamplingParams::greedy();
    for (index, case) in reference(checkpoint).iter().enumerate() {
        let tokens = tokens_of(case);
        let last = numbers(&case["last_logits"], |number| number.as_f64().map(|number| number as f32));
        let best = numbers(&case["argmax"], |id| id.as_u64().map(|id| id as u32));
        let pool = runner.pages().clone();
        let lease = pool.lease(pool.pages_for(tokens.len())).expect("free pages");
        let logits = runner.score(&input(&tokens, 0, &lease, &greedy)).expect("logits");
        assert_close(logits.last().expect("a row"), &last, &format!("case {index}"));
        for (position, (logits, &best)) in logits.iter().zip(&best).enumerate() {
            let got = argmax(logits);
            let lead = logits[got as usize] - logits[best as usize];
            assert!(lead <= NEAR_TIE, "case {index}, position {position}: {got} leads {best} by {lead}");
        }
        assert_eq!(argmax(logits.last().expect("a row")), *best.last().expect("a position"), "case {index}");
    }
}

/// Chunks of a prompt, each attending to the pages of those before it, end in the same logits as the prompt at once.
pub fn a_prompt_in_chunks_equals_the_prompt_at_once(device: &Device, checkpoint: Checkpoint) {
    let mut runner = load(device, checkpoint, options(GraphMode::Off));
    for case in reference(checkpoint) {
        let tokens = tokens_of(&case);
        let len = tokens.len();
        let whole = logits_in_steps(&mut runner, &tokens, &[len]);
        let halves = logits_in_steps(&mut runner, &tokens, &[len / 2, len]);
        assert_same(device, &halves, &whole, &format!("halves of {len} tokens"));
        // 16 tokens are a page: ends before, on and after its edge.
        for edge in [15, 16, 17, 18] {
            let chunks = logits_in_steps(&mut runner, &tokens, &[edge, len]);
            assert_same(device, &chunks, &whole, &format!("{edge} of {len} tokens"));
        }
    }
}

/// Long prompts in chunks of 16 and 64 tokens have the same answers, eagerly and with graphs whose breaks see the prefix.
pub fn chunked_prompts_have_the_answers_of_whole_ones(device: &Device, checkpoint: Checkpoint) {
    let prompts: Vec<Vec<u32>> =
        reference(checkpoint).chunks(4).map(|cases| cases.iter().flat_map(tokens_of).collect()).collect();
    let tokens = |options: ModelRunnerOptions| {
        let mut runner = load(device, checkpoint, options);
        let answers: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| answer(&mut runner, prompt, SamplingParams::greedy())).collect();
        (answers, runner.stats().num_replays)
    };
    let (whole, _) = tokens(options(GraphMode::Off));
    for chunk in [16, 64] {
        let chunked = |graph| ModelRunnerOptions {
            chunked_prefill_size: chunk,
            cuda_graph_sizes: Some(vec![16, 64]),
            ..options(graph)
        };
        assert_eq!(tokens(chunked(GraphMode::Off)).0, whole, "chunks of {chunk}");
        let verified =
            ModelRunnerOptions { verify_graph: Some(1), poison_graph_memory: true, ..chunked(GraphMode::Ahead) };
        for graphs in [chunked(GraphMode::Ahead), verified] {
            let (got, num_replays) = tokens(graphs);
            assert_eq!(got, whole, "chunks of {chunk} with graphs");
            let prefills: usize = prompts.iter().map(|prompt| prompt.len().div_ceil(chunk)).sum();
            assert!(num_replays as usize >= prefills, "{num_replays} replays");
        }
    }
}

/// A sequence that gave its pages and state back, as a preempted one does, goes on with the same tokens once it is computed
/// again from its first token.
pub fn a_preempted_sequence_goes_on_as_if_it_had_not_been(device: &Device, checkpoint: Checkpoint) {
    let mut runner = load(device, checkpoint, options(GraphMode::Ahead));
    let prompt = tokens_of(&reference(checkpoint)[0]);
    let expected = answer(&mut runner, &prompt, SamplingParams::greedy());
    let (pool, greedy) = (runner.pages().clone(), SamplingParams::greedy());
    let mut tokens = prompt.clone();
    for kept in [5, 9, 24] {
        // Others use what the sequence gave back.
        answer(&mut runner, &tokens_of(&reference(checkpoint)[kept % 8]), SamplingParams::greedy());
        let lease = pool.lease(pool.pages_for(prompt.len() + kept)).expect("pages");
        let mut computed = 0;
        while tokens.len() < prompt.len() + kept {
            let output = runner.step(&[input(&tokens[computed..], computed, &lease, &greedy)]).expect("a step");
            computed = tokens.len();
            tokens.push(output.tokens[0].id);
        }
    }
    assert_eq!(tokens[prompt.len()..], expected);
}

/// Sequences of different lengths, some with a prefix, do not see each other.
pub fn a_ragged_batch_equals_each_sequence_alone(device: &Device, checkpoint: Checkpoint) {
    let mut runner = load(device, checkpoint, options(GraphMode::Off));
    let greedy = SamplingParams::greedy();
    let prompts: Vec<Vec<u32>> = reference(checkpoint).iter().map(tokens_of).collect();
    let alone: Vec<Vec<f32>> =
        prompts.iter().map(|tokens| logits_in_steps(&mut runner, tokens, &[tokens.len()])).collect();
    let pool = runner.pages().clone();
    let leases: Vec<PageLease> =
        prompts.iter().map(|tokens| pool.lease(pool.pages_for(tokens.len())).expect("free pages")).collect();
    // Every second sequence has a prefix in the cache.
    for (tokens, lease) in prompts.iter().zip(&leases).step_by(2) {
        runner.step(&[input(&tokens[..20], 0, lease, &greedy)]).expect("a prefix");
    }
    let batch: Vec<SequenceInput<'_>> = prompts
        .iter()
        .zip(&leases)
        .enumerate()
        .map(|(index, (tokens, lease))| {
            let past_len = if index % 2 == 0 { 20 } else { 0 };
            input(&tokens[past_len..], past_len, lease, &greedy)
        })
        .collect();
    let output = runner.step(&batch).expect("a step");
    for (index, (token, alone)) in output.tokens.iter().zip(&alone).enumerate() {
        assert_same(device, token.logits.as_deref().expect("logits"), alone, &format!("sequence {index}"));
    }
    pool.check(&leases);
}

/// The decode kernel, one token at a time, agrees with the prefill kernel.
pub fn a_decode_equals_a_prefill_of_the_same_tokens(device: &Device, checkpoint: Checkpoint) {
    let mut runner = load(device, checkpoint, options(GraphMode::Off));
    for (index, case) in reference(checkpoint).iter().enumerate() {
        let tokens = tokens_of(case);
        let whole = logits_in_steps(&mut runner, &tokens, &[tokens.len()]);
        let ends: Vec<usize> = (10..=tokens.len()).collect();
        let decoded = logits_in_steps(&mut runner, &tokens, &ends);
        assert_close(&decoded, &whole, &format!("case {index}"));
        assert_eq!(argmax(&decoded), argmax(&whole), "case {index}");
    }
}

pub(super) fn answer(runner: &mut ModelRunner, prompt: &[u32], sampling: SamplingParams) -> Vec<u32> {
    let mut options = GenerateOptions::new(24, sampling);
    options.ignore_eos = true;
    runner.generate(prompt, &options, &mut |_| ControlFlow::Continue(())).expect("an answer").tokens
}

/// Captured ahead or lazily, in debug mode, with poisoned memory, with every replay verified: the tokens are the same.
pub fn graphs_give_the_tokens_of_eager_runs(device: &Device, checkpoint: Checkpoint) {
    let prompts: Vec<Vec<u32>> = reference(checkpoint).iter().take(3).map(tokens_of).collect();
    let tokens = |options: ModelRunnerOptions| {
        let mut runner = load(device, checkpoint, options);
        let answers: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| answer(&mut runner, prompt, SamplingParams::greedy())).collect();
        (answers, runner.stats().clone())
    };
    let (expected, stats) = tokens(options(GraphMode::Off));
    assert_eq!((stats.num_replays, stats.num_captures), (0, 0));
    for options in [
        options(GraphMode::Ahead),
        options(GraphMode::Lazy),
        ModelRunnerOptions { cuda_graph_sizes: None, cuda_graph_lazy_max_graphs: 1, ..options(GraphMode::Lazy) },
        ModelRunnerOptions { debug_cuda_graph: true, ..options(GraphMode::Ahead) },
        ModelRunnerOptions { poison_graph_memory: true, verify_graph: Some(1), ..options(GraphMode::Ahead) },
    ] {
        let (got, stats) = tokens(options.clone());
        assert_eq!(got, expected, "{options:?}");
        if options.debug_cuda_graph {
            assert_eq!((stats.num_replays, stats.num_captures), (0, 0), "{stats:?}");
            continue;
        }
        assert!(stats.num_replays >= 60, "decodes replay: {stats:?}");
        assert_eq!(stats.num_capture_failures, 0, "{stats:?}");
        assert!(options.cuda_graph_lazy_max_graphs > 1 || stats.num_evictions > 0, "{stats:?}");
        assert_eq!(options.verify_graph.map_or(0, |_| stats.num_replays), stats.num_verified);
    }
}

/// Batches of one padded size make the same launches in breaks, so a healed prefill is one launch and patches nothing.
pub fn healed_prefills_patch_no_node(device: &Device, checkpoint: Checkpoint) {
    let size = 40;
    let mut runner = load(
        device,
        checkpoint,
        ModelRunnerOptions { cuda_graph_sizes: Some(vec![size]), ..options(GraphMode::Ahead) },
    );
    let (prompt, greedy) = (tokens_of(&reference(checkpoint)[0]).repeat(4), SamplingParams::greedy());
    let pool = runner.pages().clone();
    let leases: Vec<PageLease> = (0..3).map(|_| pool.lease(pool.pages_for(100)).expect("pages")).collect();
    let mut step = |sequences: &[(usize, usize)]| {
        let sequences = sequences.iter().zip(&leases);
        // What lies before does not matter here.
        for (&(past, _), lease) in sequences.clone() {
            lease.state().into_iter().for_each(|state| state.assume(past));
        }
        let batch: Vec<_> =
            sequences.map(|(&(past, new), lease)| input(&prompt[past..past + new], past, lease, &greedy)).collect();
        runner.step(&batch).expect("a step");
        let description = runner.describe(Phase::Prefill, size).expect("a graph");
        assert!(!description.breaks.is_empty());
        assert!(
            description.breaks.iter().all(|at| at.not_healable.is_none() && at.num_patched == 0),
            "{description:?}"
        );
        description.num_merged
    };
    // A replay that could not be healed would leave another merged executable.
    let full = [step(&[(0, 40)]), step(&[(40, 40)]), step(&[(0, 3), (10, 13), (0, 24)])];
    assert_eq!(full, [1; 3]);
    // Other work, but always the same: the padded rows are scrubbed.
    let padded = [step(&[(0, 35)]), step(&[(50, 17), (3, 21)]), step(&[(0, 3), (20, 13), (0, 20)])];
    assert_eq!(padded, [padded[0]; 3]);
}

/// A sequence draws the same tokens alone and in a batch, with and without graphs; another seed draws others.
pub fn sampled_tokens_depend_on_seed_and_step_alone(device: &Device, checkpoint: Checkpoint) {
    let sampling = SamplingParams { temperature: 3.0, top_k: Some(200), top_p: 0.99, min_p: 0.0, seed: 11 };
    let prompt = tokens_of(&reference(checkpoint)[0]);
    let mut eager = load(device, checkpoint, options(GraphMode::Off));
    let expected = answer(&mut eager, &prompt, sampling);
    assert_eq!(answer(&mut eager, &prompt, sampling), expected, "the same seed");
    assert_ne!(answer(&mut eager, &prompt, SamplingParams { seed: 12, ..sampling }), expected, "another seed");
    let mut graphs = load(device, checkpoint, options(GraphMode::Ahead));
    assert_eq!(answer(&mut graphs, &prompt, sampling), expected, "with graphs");

    let pool = eager.pages().clone();
    let leases: Vec<PageLease> = (0..3).map(|_| pool.lease(pool.pages_for(prompt.len())).expect("pages")).collect();
    let greedy = SamplingParams::greedy();
    let batch = [
        input(&prompt, 0, &leases[0], &greedy),
        input(&prompt, 0, &leases[1], &sampling),
        input(&prompt[..20], 0, &leases[2], &sampling),
    ];
    let output = eager.step(&batch).expect("a step");
    assert_eq!(output.tokens[1].id, expected[0], "in a batch");
}

/// The token's log probability and the best alternatives come from the unscaled logits.
pub fn log_probabilities_are_of_the_logits(device: &Device, checkpoint: Checkpoint) {
    let mut runner = load(device, checkpoint, options(GraphMode::Off));
    let prompt = tokens_of(&reference(checkpoint)[0]);
    let pool = runner.pages().clone();
    let lease = pool.lease(pool.pages_for(prompt.len())).expect("pages");
    let sampling = SamplingParams::greedy();
    let batch = [SequenceInput { top_logprobs: Some(3), ..input(&prompt, 0, &lease, &sampling) }];
    let token = runner.step(&batch).expect("a step").tokens.remove(0);
    let logits = token.logits.expect("logits were asked for");
    let sum: f32 = logits.iter().map(|logit| (logit - logits[token.id as usize]).exp()).sum();
    let logprob = token.logprob.expect("log probabilities were asked for");
    assert!((logprob + sum.ln()).abs() < 1e-4, "{logprob} is not {}", -sum.ln());
    assert_eq!((token.top.len(), token.top[0]), (3, (token.id, logprob)));
    assert!(token.top.is_sorted_by(|a, b| a.1 >= b.1), "{:?}", token.top);
}

/// A step that is refused runs nothing: the next one gives what it would have given.
pub fn a_batch_that_does_not_fit_is_refused_and_changes_nothing(device: &Device, checkpoint: Checkpoint) {
    let mut runner = load(device, checkpoint, options(GraphMode::Ahead));
    let prompt = tokens_of(&reference(checkpoint)[0]);
    let expected = logits_in_steps(&mut runner, &prompt, &[prompt.len()]);
    let pool = runner.pages().clone();
    let lease = pool.lease(1).expect("a page");
    let greedy = SamplingParams::greedy();
    let good = input(&prompt[..4], 0, &lease, &greedy);
    for refused in [
        vec![],
        vec![good; 9],
        vec![SequenceInput { tokens: &[], ..good }],
        vec![SequenceInput { tokens: &[512], ..good }],
        vec![SequenceInput { pages: &[], ..good }],
        vec![SequenceInput { pages: &[9999], ..good }],
        vec![SequenceInput { past_len: 1021, ..good }],
        vec![SequenceInput { tokens: &[1; 1025], ..good }],
        vec![SequenceInput { sampling: &SamplingParams { top_p: 0.0, ..greedy }, ..good }],
    ] {
        let launches = runner.runtime_stats().num_launches;
        let error = runner.step(&refused).expect_err("refused");
        assert!(matches!(error, Error::Batch { .. } | Error::Sampling { .. }), "{error}");
        assert_eq!(runner.runtime_stats().num_launches, launches, "nothing ran");
    }
    assert_eq!(logits_in_steps(&mut runner, &prompt, &[prompt.len()]), expected);
}

/// Random weights need `config.json` only: no tensors, no tokenizer.
pub fn a_configuration_alone_gives_the_same_finite_logits_each_time(device: &Device, checkpoint: Checkpoint) {
    let dir = std::env::temp_dir().join(format!("bcg-{checkpoint}-alone-{}-{:?}", std::process::id(), device.kind()));
    std::fs::create_dir_all(&dir).expect("a writable temporary folder");
    std::fs::copy(folder(checkpoint).join("config.json"), dir.join("config.json")).expect("a copy");
    let options = ModelRunnerOptions {
        load_format: LoadFormat::Dummy,
        skip_tokenizer_init: true,
        mem_fraction_static: Some(0.5),
        ..options(GraphMode::Off)
    };
    let logits = [(); 2].map(|()| {
        let mut runner = ModelRunner::load(device, &dir, options.clone(), &mut |_| ()).expect("the model loads");
        assert!(matches!(runner.tokenizer(), Err(Error::NoTokenizer)));
        logits_in_steps(&mut runner, &[3, 1, 4, 1, 5], &[4, 5])
    });
    std::fs::remove_dir_all(&dir).expect("it is there");
    assert_eq!(logits[0], logits[1]);
    let (least, most) = logits[0].iter().fold((f32::MAX, f32::MIN), |(a, b), v| (a.min(*v), b.max(*v)));
    assert!(most - least > 0.1 && logits[0].iter().all(|logit| logit.is_finite()), "{least}..{most}");
}
