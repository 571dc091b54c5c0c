//! Steps that are launched before the tokens of the one before are read, and what is asked of the logits.

use bcg_models::{ChosenToken, GraphMode, ModelRunner, PendingStep, SamplingParams, SequenceInput};
use bcg_runtime::Device;

use super::checkpoint::{reference, tokens_of};
use super::{Checkpoint, load, options};

/// Tokens generated for each prompt.
const GENERATED: usize = 12;

/// Two sequences that trade places in the batch, and a third whose prompt runs beside them, with every step launched before
/// the one before is collected: the same tokens as one after the other.
pub fn a_step_launched_ahead_takes_the_tokens_that_nobody_has_read(device: &Device, checkpoint: Checkpoint) {
    let prompts: Vec<Vec<u32>> = reference(checkpoint).iter().take(3).map(tokens_of).collect();
    for mode in [GraphMode::Off, GraphMode::Ahead] {
        let mut runner = load(device, checkpoint, options(mode));
        runner.capture(&mut |_| ()).expect("captured");
        assert_eq!(ahead(&mut runner, &prompts, true), ahead(&mut runner, &prompts, false), "{mode:?}");
    }
}

/// Generates with steps of one shape, read late or at once.
fn ahead(runner: &mut ModelRunner, prompts: &[Vec<u32>], late: bool) -> Vec<Vec<u32>> {
    let pool = runner.pages().clone();
    let room = |prompt: &Vec<u32>| pool.pages_for(prompt.len() + GENERATED);
    let leases: Vec<_> = prompts.iter().map(|prompt| pool.lease(room(prompt)).expect("free pages")).collect();
    let sampling = SamplingParams { seed: 5, ..SamplingParams::default() };
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut launched = vec![0; prompts.len()];
    let mut rows: Vec<Option<usize>> = vec![None; prompts.len()];
    let mut before: Option<(PendingStep, Vec<usize>)> = None;
    for step in 0..GENERATED {
        // The third sequence comes later, and the order of the batch turns.
        let mut order: Vec<usize> = (0..prompts.len()).filter(|&sequence| sequence < 2 || step >= 3).collect();
        order.rotate_left(step % 2);
        let batch: Vec<_> = order
            .iter()
            .map(|&at| {
                let (chosen, tokens): (_, &[u32]) = match (launched[at], rows[at]) {
                    (0, _) => (None, &prompts[at]),
                    (_, Some(row)) if late => (Some(ChosenToken::of_last(row)), &[]),
                    _ => (None, &answers[at][answers[at].len() - 1..]),
                };
                let past_len = if launched[at] == 0 { 0 } else { prompts[at].len() + launched[at] - 1 };
                let (state, num_drawn) = (leases[at].state(), launched[at] as u64);
                let input = SequenceInput::new(tokens, past_len, leases[at].pages(), &sampling);
                SequenceInput { chosen, state, num_drawn, ..input }
            })
            .collect();
        let pending = runner.launch(&batch).expect("launched");
        drop(batch);
        rows = vec![None; prompts.len()];
        for (row, &at) in order.iter().enumerate() {
            launched[at] += 1;
            rows[at] = Some(row);
        }
        let done = if late { before.replace((pending, order)) } else { Some((pending, order)) };
        read(runner, done, &mut answers);
    }
    read(runner, before, &mut answers);
    answers
}

fn read(runner: &mut ModelRunner, step: Option<(PendingStep, Vec<usize>)>, answers: &mut [Vec<u32>]) {
    let Some((pending, order)) = step else { return };
    let output = runner.collect(pending).expect("collected");
    for (token, at) in output.tokens.iter().zip(order) {
        answers[at].push(token.id);
    }
}

/// A bias lifts a token above all others in its own row, a mask leaves one token, whatever the logits are; other rows of
/// the batch are as they were.
pub fn bias_and_mask_decide_what_is_chosen(device: &Device, checkpoint: Checkpoint) {
    let mut runner = load(device, checkpoint, options(GraphMode::Off));
    let prompt = tokens_of(&reference(checkpoint)[0]);
    let pool = runner.pages().clone();
    let leases = [0; 4].map(|_| pool.lease(pool.pages_for(prompt.len())).expect("free pages"));
    let (greedy, random) = (SamplingParams::greedy(), SamplingParams { seed: 3, ..SamplingParams::default() });
    let vocab = runner.config().vocab_size;
    let mut mask = vec![0; vocab.div_ceil(32)];
    mask[77 / 32] |= 1 << (77 % 32);
    let bias = [(11, 1000.0), (12, 500.0)];
    let input = |at: usize, sampling| {
        let input = SequenceInput::new(&prompt, 0, leases[at].pages(), sampling);
        SequenceInput { state: leases[at].state(), top_logprobs: Some(2), ..input }
    };
    let batch = [
        input(0, &greedy),
        SequenceInput { logit_bias: &bias, ..input(1, &greedy) },
        SequenceInput { token_mask: Some(&mask), ..input(2, &random) },
        SequenceInput { logit_bias: &bias, token_mask: Some(&mask), ..input(3, &greedy) },
    ];
    let tokens = runner.step(&batch).expect("a step").tokens;
    let free = runner.step(&[input(0, &greedy)]).expect("a step").tokens;
    let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
    assert_eq!(ids, [free[0].id, 11, 77, 77]);
    assert_eq!(tokens[1].top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [11, 12]);
    assert_eq!(tokens[2].top.len(), 1, "a mask leaves nothing else");
    assert!(tokens[2].logprob.is_some_and(|logprob| logprob.abs() < 1e-3), "{:?}", tokens[2].logprob);
    let short = [0; 1];
    let refused = runner.step(&[SequenceInput { token_mask: Some(&short), ..input(0, &greedy) }]);
    assert!(vocab > 32 && refused.expect_err("too short").to_string().contains("words of a token mask"));
    let unknown = [(vocab as u32, 1.0)];
    let refused = runner.step(&[SequenceInput { logit_bias: &unknown, ..input(0, &greedy) }]);
    assert!(refused.expect_err("no such token").to_string().contains("token of a logit bias"));
}
