//! A checkpoint that is divided among several ranks: the same tokens on every path, and answers as right as those of one.

use std::collections::BTreeSet;

use bcg_models::weights::{Experts, MoeA2a};
use bcg_models::{GraphMode, ModelRunner, ModelRunnerOptions, SamplingParams, SequenceInput, registry};
use bcg_runtime::{Device, ReplayMode};

use super::checkpoint::{answer, input, match_the_reference, reference, tokens_of};
use super::eval::{Style, accuracy};
use super::{Checkpoint, folder, load_ranks, options};

/// Problems that two ranks solve as well as one, and more ranks a part of them, for the host device computes the ranks one
/// after the other; `BCG_EVAL_PROBLEMS` says how many else, of the 200 that there are.
const NUM_PROBLEMS: usize = 24;

/// The ways to divide experts, and how rows come to them.
pub const BY_CHANNELS: Experts = Experts::ByChannels;
/// See [`BY_CHANNELS`].
pub const WHOLE: Experts = Experts::Whole(MoeA2a::None);
/// See [`BY_CHANNELS`].
pub const PUSHED: Experts = Experts::Whole(MoeA2a::Push);
/// See [`BY_CHANNELS`].
pub const IN_BREAK: Experts = Experts::Whole(MoeA2a::Break);

/// A rule for several ranks, each with a device.
pub type RanksRule = (&'static str, fn(&[Device], Checkpoint, Experts));

/// Expands `$then!` over the checkpoints, the numbers of ranks that divide them and how, and over the rules.
#[macro_export]
macro_rules! ranks_rules {
    ($then:ident) => {
        $then! {
            worlds {
                qwen3_2 = ("tiny-qwen3", 2, BY_CHANNELS),
                qwen3_moe_2 = ("tiny-qwen3-moe", 2, BY_CHANNELS),
                qwen3_moe_experts_2 = ("tiny-qwen3-moe", 2, WHOLE),
                qwen3_moe_break_2 = ("tiny-qwen3-moe", 2, IN_BREAK),
                nemotron_h_2 = ("tiny-nemotron-h", 2, BY_CHANNELS),
                deepseek_v3_2 = ("tiny-deepseek-v3", 2, BY_CHANNELS),
                deepseek_v3_pushed_2 = ("tiny-deepseek-v3", 2, PUSHED),
                qwen3_4 = ("tiny-qwen3", 4, BY_CHANNELS),
                qwen3_moe_4 = ("tiny-qwen3-moe", 4, BY_CHANNELS),
                deepseek_v3_4 = ("tiny-deepseek-v3", 4, BY_CHANNELS),
            }
            rules {
                ranks_match_the_reference,
                ranks_choose_the_same_tokens_on_every_path,
                ranks_solve_what_one_solves,
                ranks_go_on_after_a_step_that_is_refused,
            }
        }
    };
}

macro_rules! lists {
    (worlds { $($module:ident = ($checkpoint:literal, $num_ranks:literal, $experts:ident),)* } rules { $($rule:ident,)* }) => {
        /// The tiny checkpoints, with the numbers of ranks that divide them, and how they divide experts.
        pub const WORLDS: &[(Checkpoint, usize, Experts)] = &[$(($checkpoint, $num_ranks, $experts)),*];

        /// The rules of this group.
        pub const RANKS_RULES: &[RanksRule] =
            &[$((stringify!($rule), $rule as fn(&[Device], Checkpoint, Experts))),*];
    };
}

ranks_rules!(lists);

/// The options of a tiny checkpoint whose experts are divided so.
fn dividing(experts: Experts, graph: GraphMode) -> ModelRunnerOptions {
    ModelRunnerOptions { experts, ..options(graph) }
}

/// The logits of whole prompts are those of the reference.
pub fn ranks_match_the_reference(devices: &[Device], checkpoint: Checkpoint, experts: Experts) {
    match_the_reference(&mut load_ranks(devices, checkpoint, dividing(experts, GraphMode::Off)), checkpoint);
}

/// Eagerly, as a chain, healed and captured lazily: greedy and drawn tokens are the same, token for token.
pub fn ranks_choose_the_same_tokens_on_every_path(devices: &[Device], checkpoint: Checkpoint, experts: Experts) {
    let prompts: Vec<Vec<u32>> = reference(checkpoint).iter().take(2).map(tokens_of).collect();
    let drawn = SamplingParams { temperature: 3.0, top_k: Some(200), top_p: 0.99, min_p: 0.0, seed: 11 };
    let answers = |runner: &mut ModelRunner| -> Vec<Vec<u32>> {
        let samplings = [SamplingParams::greedy(), drawn];
        let all = prompts.iter().flat_map(|prompt| samplings.map(|sampling| (prompt, sampling)));
        all.map(|(prompt, sampling)| answer(runner, prompt, sampling)).collect()
    };
    let mut eager = load_ranks(devices, checkpoint, dividing(experts, GraphMode::Off));
    assert_eq!(eager.num_ranks(), devices.len());
    let expected = answers(&mut eager);
    assert_ne!(expected[0], expected[1], "drawn tokens are others than the most likely ones");
    drop(eager);
    for mode in [GraphMode::Ahead, GraphMode::Lazy] {
        let mut runner = load_ranks(devices, checkpoint, dividing(experts, mode));
        assert_eq!(answers(&mut runner), expected, "{mode:?}, healed");
        let healed = runner.stats();
        assert!(healed.num_replays >= 60 && healed.num_capture_failures == 0, "{healed:?}");
        if mode == GraphMode::Ahead {
            assert_eq!(healed.num_captures as usize, captured_sizes(&runner), "{healed:?}");
            runner.set_replay_mode(ReplayMode::Chain).expect("all ranks live");
            assert_eq!(answers(&mut runner), expected, "as a chain");
            let chained: u64 = runner.stats().chained.values().sum();
            assert!(chained > healed.chained.values().sum::<u64>(), "{:?}", runner.stats());
        }
    }
}

fn captured_sizes(runner: &ModelRunner) -> usize {
    bcg_models::Phase::ALL.iter().map(|phase| runner.graph_sizes(*phase).len()).sum()
}

/// As many problems are right with several ranks as with one.
pub fn ranks_solve_what_one_solves(devices: &[Device], checkpoint: Checkpoint, experts: Experts) {
    let asked = std::env::var("BCG_EVAL_PROBLEMS").ok().and_then(|count| count.parse().ok());
    let problems = match experts {
        Experts::ByChannels => 2 * NUM_PROBLEMS,
        Experts::Whole(_) => NUM_PROBLEMS, // what is not experts is divided as before
    };
    let count = asked.unwrap_or(problems / devices.len());
    let solve = |devices: &[Device]| {
        let mut runner = load_ranks(devices, checkpoint, dividing(experts, GraphMode::Ahead));
        accuracy(&mut runner, checkpoint, Style::Chat, count).0
    };
    let (one, ranks) = (solve(&devices[..1]), solve(devices));
    assert!(ranks >= one, "{} ranks solve {ranks} of the problems, one solves {one}", devices.len());
}

/// Batches that cannot be run, steps that nobody collects, and a third one under way break nothing.
pub fn ranks_go_on_after_a_step_that_is_refused(devices: &[Device], checkpoint: Checkpoint, experts: Experts) {
    let prompt = tokens_of(&reference(checkpoint)[0]);
    let mut runner = load_ranks(devices, checkpoint, dividing(experts, GraphMode::Ahead));
    let expected = answer(&mut runner, &prompt, SamplingParams::greedy());
    let (pool, greedy) = (runner.pages().clone(), SamplingParams::greedy());
    let leases: Vec<_> = (0..3).map(|_| pool.lease(pool.pages_for(prompt.len())).expect("pages")).collect();
    let batch = |lease: usize| [input(&prompt, 0, &leases[lease], &greedy)];
    let error = runner.launch(&[SequenceInput { pages: &[], ..batch(0)[0] }]).expect_err("no pages").to_string();
    assert!(error.contains("pages of a sequence"), "{error}");
    let pending: Vec<_> = (0..2).map(|lease| runner.launch(&batch(lease)).expect("a step")).collect();
    if devices.len() > 1 {
        let error = runner.launch(&batch(2)).expect_err("a third step").to_string();
        assert!(error.contains("at most 2 not collected"), "{error}");
    }
    drop(pending);
    let tokens: BTreeSet<u32> =
        (0..3).map(|lease| runner.step(&batch(lease)).expect("a step").tokens.remove(0).id).collect();
    assert_eq!(tokens, BTreeSet::from([expected[0]]));
    assert!(runner.world().lost().is_none());
    assert_eq!(answer(&mut runner, &prompt, SamplingParams::greedy()), expected);
}

/// A number of ranks that does not divide the model is refused by the name of the field, with the numbers that work.
pub fn ranks_that_do_not_divide_a_model_are_refused(checkpoint: Checkpoint) {
    let config = bcg_models::ModelConfig::load(&folder(checkpoint)).expect("a config");
    let refused = registry::check_shard(&config, 3, Experts::ByChannels).expect_err("three ranks").to_string();
    let devices = [Device::host(), Device::host(), Device::host()];
    let options = ModelRunnerOptions { ..options(GraphMode::Off) };
    let error = ModelRunner::load_ranks(&devices, &folder(checkpoint), options, &mut |_| ()).expect_err("three ranks");
    assert_eq!(error.to_string(), refused);
}
