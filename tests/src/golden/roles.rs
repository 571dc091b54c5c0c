//! A checkpoint whose prompts run on one device and whose answers on another: the tokens and logits of one device.

use bcg_models::batch::Push;
use bcg_models::{GraphMode, ModelRunner, ModelRunnerOptions, Role, SamplingParams, SequenceInput};
use bcg_runtime::{Device, ReplayMode};

use super::checkpoint::{input, reference, tokens_of};
use super::{Checkpoint, folder, load, options};

/// Tokens of an answer.
const ANSWER: usize = 4;

/// A rule for a pair: the device of the prefill role, and that of the decode role.
pub type RolesRule = (&'static str, fn(&[Device; 2], Checkpoint));

/// Expands `$then!` over the checkpoints, each with the name of its module of tests, and over the rules of a pair.
#[macro_export]
macro_rules! roles_rules {
    ($then:ident) => {
        $then! {
            checkpoints {
                qwen3 = "tiny-qwen3",
                qwen3_moe = "tiny-qwen3-moe",
                nemotron_h = "tiny-nemotron-h",
                deepseek_v3 = "tiny-deepseek-v3",
            }
            rules {
                a_pair_chooses_the_tokens_of_one_device,
                rows_that_are_there_already_are_pushed_as_well,
                a_push_without_room_is_refused,
            }
        }
    };
}

macro_rules! lists {
    (checkpoints { $($module:ident = $checkpoint:literal,)* } rules { $($rule:ident,)* }) => {
        /// The rules of this group.
        pub const ROLES_RULES: &[RolesRule] = &[$((stringify!($rule), $rule as fn(&[Device; 2], Checkpoint))),*];
    };
}

roles_rules!(lists);

/// Options with few graphs.
fn sizes(graph: GraphMode) -> ModelRunnerOptions {
    ModelRunnerOptions { cuda_graph_sizes: Some(vec![1, 8, 40]), ..options(graph) }
}

/// Two runners: the prefill role pushes to the decode role.
struct Pair {
    prefill: ModelRunner,
    decode: ModelRunner,
}

impl Pair {
    fn load([near, far]: &[Device; 2], checkpoint: Checkpoint, graph: GraphMode) -> Self {
        let load = |device, options: ModelRunnerOptions, role| {
            let loaded = ModelRunner::load_role(device, &folder(checkpoint), options, role, &mut |_| ());
            let mut runner = loaded.expect("the tiny checkpoint loads");
            runner.capture(&mut |_| ()).expect("every size is captured");
            runner
        };
        // Another number of pages, so that no page has the same place in both.
        let few = ModelRunnerOptions { kv_cache_tokens: 2048, ..sizes(graph) };
        let decode = load(far, few, Role::Decode { prefill: near.clone() });
        let prefill = load(near, sizes(graph), Role::Prefill { decode: decode.caches().clone() });
        Self { prefill, decode }
    }

    /// Prefills a prompt in steps that end at `ends`, then decodes on the other device. The rows of the tokens before the
    /// first step's are pushed with it.
    fn answer(&mut self, prompt: &[u32], ends: &[usize], sampling: &SamplingParams) -> Vec<u32> {
        let [pool, far_pool] = [&self.prefill, &self.decode].map(|runner| runner.pages().clone());
        let kept = far_pool.lease(3).expect("pages"); // the pages of the two differ
        let near = pool.lease(pool.pages_for(prompt.len())).expect("pages");
        let mut far = far_pool.lease(far_pool.pages_for(prompt.len() + ANSWER)).expect("pages");
        drop(kept);
        let mut begin = 0;
        let mut answer = Vec::new();
        for &end in ends {
            let state = far.state().filter(|_| end == prompt.len()).map(|state| state.slots(0).1);
            let push = Some(Push { pages: far.pages(), from: begin, state });
            let step = SequenceInput { push, logits: false, ..input(&prompt[begin..end], begin, &near, sampling) };
            answer = vec![self.prefill.step(&[step]).expect("a step").tokens[0].id];
            begin = end;
        }
        drop(near);
        far.state().inspect(|state| state.commit(prompt.len()));
        while answer.len() < ANSWER {
            let past_len = prompt.len() + answer.len() - 1;
            far.reserve_tokens(past_len + 1).expect("pages");
            let new = &answer[answer.len() - 1..];
            let step = SequenceInput { num_drawn: answer.len() as u64, ..input(new, past_len, &far, sampling) };
            let token = self.decode.step(&[step]).expect("a step").tokens[0].id;
            answer.push(token);
        }
        answer
    }
}

/// As [`Pair::answer`], on one device.
fn answer_alone(runner: &mut ModelRunner, prompt: &[u32], ends: &[usize], sampling: &SamplingParams) -> Vec<u32> {
    let pool = runner.pages().clone();
    let lease = pool.lease(pool.pages_for(prompt.len() + ANSWER)).expect("pages");
    let (mut begin, mut answer) = (0, Vec::new());
    for &end in ends {
        answer =
            vec![runner.step(&[input(&prompt[begin..end], begin, &lease, sampling)]).expect("a step").tokens[0].id];
        begin = end;
    }
    while answer.len() < ANSWER {
        let past_len = prompt.len() + answer.len() - 1;
        let new = &answer[answer.len() - 1..];
        let step = SequenceInput { num_drawn: answer.len() as u64, ..input(new, past_len, &lease, sampling) };
        let token = runner.step(&[step]).expect("a step").tokens[0].id;
        answer.push(token);
    }
    answer
}

/// Prompts, and where the steps of their prefills end: at once, within pages, at their edges, and one token alone.
fn cases(checkpoint: Checkpoint) -> Vec<(Vec<u32>, Vec<usize>)> {
    let prompt: Vec<u32> = reference(checkpoint).iter().flat_map(tokens_of).take(40).collect();
    let part = |len: usize| prompt[..len].to_vec();
    vec![(part(37), vec![37]), (part(40), vec![13, 20, 39, 40]), (part(33), vec![16, 33]), (part(1), vec![1])]
}

/// Eagerly, as a chain, healed and captured lazily: the tokens are those of one device, drawn ones too.
pub fn a_pair_chooses_the_tokens_of_one_device(devices: &[Device; 2], checkpoint: Checkpoint) {
    let drawn = SamplingParams { temperature: 3.0, top_k: Some(200), top_p: 0.99, min_p: 0.0, seed: 11 };
    let mut alone = load(&devices[0], checkpoint, options(GraphMode::Off));
    let all = || cases(checkpoint).into_iter().zip([SamplingParams::greedy(), drawn].into_iter().cycle());
    let expected: Vec<Vec<u32>> =
        all().map(|((prompt, ends), sampling)| answer_alone(&mut alone, &prompt, &ends, &sampling)).collect();
    drop(alone);
    for mode in [GraphMode::Off, GraphMode::Ahead, GraphMode::Lazy] {
        let mut pair = Pair::load(devices, checkpoint, mode);
        let answers = |pair: &mut Pair| -> Vec<Vec<u32>> {
            all().map(|((prompt, ends), sampling)| pair.answer(&prompt, &ends, &sampling)).collect()
        };
        assert_eq!(answers(&mut pair), expected, "{mode:?}");
        let [prefill, decode] = [pair.prefill.stats(), pair.decode.stats()];
        assert!(prefill.num_capture_failures + decode.num_capture_failures == 0, "{prefill:?} {decode:?}");
        assert_eq!(prefill.num_replays > 0, mode != GraphMode::Off, "{prefill:?}");
        assert!(pair.prefill.graph_sizes(bcg_models::Phase::Decode).is_empty(), "the prefill role never decodes");
        if mode == GraphMode::Ahead {
            pair.prefill.set_replay_mode(ReplayMode::Chain).expect("it lives");
            assert_eq!(answers(&mut pair), expected, "as a chain");
        }
    }
}

/// The first step pushes what earlier steps of others left in its pages, as a prefix cache has it.
pub fn rows_that_are_there_already_are_pushed_as_well(devices: &[Device; 2], checkpoint: Checkpoint) {
    let mut pair = Pair::load(devices, checkpoint, GraphMode::Ahead);
    if !pair.prefill.states().layers().is_empty() {
        return; // no prefix of a state can be shared
    }
    let (greedy, prompt) = (SamplingParams::greedy(), tokens_of(&reference(checkpoint)[0]));
    let expected = pair.answer(&prompt, &[prompt.len()], &greedy);
    let [pool, far_pool] = [&pair.prefill, &pair.decode].map(|runner| runner.pages().clone());
    let near = pool.lease(pool.pages_for(prompt.len())).expect("pages");
    let far = far_pool.lease(far_pool.pages_for(prompt.len() + 1)).expect("pages");
    let (first, rest) = prompt.split_at(21);
    pair.prefill.step(&[input(first, 0, &near, &greedy)]).expect("a step that pushes nothing");
    let push = Some(Push { pages: far.pages(), from: 0, state: None });
    let step = SequenceInput { push, ..input(rest, first.len(), &near, &greedy) };
    assert_eq!(pair.prefill.step(&[step]).expect("a step").tokens[0].id, expected[0]);
    let step = input(&expected[..1], prompt.len(), &far, &greedy);
    assert_eq!(pair.decode.step(&[step]).expect("a step").tokens[0].id, expected[1]);
}

/// Too few pages of the decode role, and pages that it does not have, are refused before anything runs.
pub fn a_push_without_room_is_refused(devices: &[Device; 2], checkpoint: Checkpoint) {
    let mut pair = Pair::load(devices, checkpoint, GraphMode::Off);
    let (greedy, prompt) = (SamplingParams::greedy(), tokens_of(&reference(checkpoint)[0]));
    let near = pair.prefill.pages().lease(pair.prefill.pages().pages_for(prompt.len())).expect("pages");
    let mut refused = |pages: &[u32]| {
        let push = Some(Push { pages, from: 0, state: None });
        let step = SequenceInput { push, ..input(&prompt, 0, &near, &greedy) };
        pair.prefill.step(&[step]).expect_err("no room").to_string()
    };
    let too_few = refused(&[0]);
    assert!(too_few.contains("pages to push to"), "{too_few}");
    let unknown = refused(&vec![128; near.pages().len()]);
    assert!(unknown.contains("page to push to") && unknown.contains("below 128"), "{unknown}");
    assert_eq!(pair.answer(&prompt, &[prompt.len()], &greedy).len(), ANSWER);
}
