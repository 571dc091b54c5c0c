//! Golden tests: real checkpoints against the reference implementation, and against themselves.
//!
//! Each tiny checkpoint was trained to solve `tests/data/mini_gsm_test.jsonl`, so accuracy is a test of every layer; its
//! `reference_logits.json` was computed by transformers in f32. Everything else compares ways to compute one thing: bit for
//! bit where the same kernels see the same numbers.

mod ahead;
mod checkpoint;
mod eval;
mod nodes;
mod pipeline;
mod ranks;
mod roles;
mod states;

use std::path::{Path, PathBuf};

use bcg_models::{GraphMode, ModelRunner, ModelRunnerOptions};
use bcg_runtime::Device;

pub use ahead::*;
pub use checkpoint::*;
pub use eval::*;
pub use nodes::*;
pub use pipeline::*;
pub use ranks::*;
pub use roles::*;
pub use states::*;

/// A folder in `models`.
pub type Checkpoint = &'static str;

/// A rule and its name.
pub type Rule = (&'static str, fn(&Device, Checkpoint));

/// Expands `$then!` over the checkpoints, each with the name of its module of tests, and over the rules. Every rule
/// holds for every checkpoint. Both lists stand here and nowhere else.
#[macro_export]
macro_rules! golden_rules {
    ($then:ident) => {
        $then! {
            checkpoints {
                qwen3 = "tiny-qwen3",
                qwen3_moe = "tiny-qwen3-moe",
                nemotron_h = "tiny-nemotron-h",
                deepseek_v3 = "tiny-deepseek-v3",
            }
            rules {
                logits_match_the_reference,
                a_prompt_in_chunks_equals_the_prompt_at_once,
                chunked_prompts_have_the_answers_of_whole_ones,
                a_preempted_sequence_goes_on_as_if_it_had_not_been,
                a_ragged_batch_equals_each_sequence_alone,
                a_decode_equals_a_prefill_of_the_same_tokens,
                graphs_give_the_tokens_of_eager_runs,
                a_step_launched_ahead_takes_the_tokens_that_nobody_has_read,
                bias_and_mask_decide_what_is_chosen,
                healed_prefills_patch_no_node,
                a_step_writes_the_states_of_its_sequences_only,
                sampled_tokens_depend_on_seed_and_step_alone,
                log_probabilities_are_of_the_logits,
                a_batch_that_does_not_fit_is_refused_and_changes_nothing,
                a_configuration_alone_gives_the_same_finite_logits_each_time,
                chat_answers_are_right,
                few_shot_answers_are_right,
            }
        }
    };
}

macro_rules! lists {
    (checkpoints { $($module:ident = $checkpoint:literal,)* } rules { $($rule:ident,)* }) => {
        /// The tiny checkpoints, one for each family.
        pub const CHECKPOINTS: &[Checkpoint] = &[$($checkpoint),*];

        /// The rules of this group.
        pub const RULES: &[Rule] = &[$((stringify!($rule), $rule as fn(&Device, Checkpoint))),*];
    };
}

golden_rules!(lists);

/// The repository's root: `BCG_ROOT` if the tests run elsewhere than they were built.
pub fn root() -> PathBuf {
    std::env::var_os("BCG_ROOT").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from)
}

/// The folder of a checkpoint.
pub fn folder(checkpoint: Checkpoint) -> PathBuf {
    root().join("models").join(checkpoint)
}

/// Options that suit a tiny checkpoint.
pub fn options(graph: GraphMode) -> ModelRunnerOptions {
    ModelRunnerOptions {
        kv_cache_tokens: 4096,
        max_running_requests: 8,
        context_length: 1024,
        chunked_prefill_size: 1024,
        graph,
        cuda_graph_sizes: Some(vec![1, 2, 3, 4, 6, 8, 40, 64, 400, 448]),
        ..ModelRunnerOptions::default()
    }
}

/// A tiny checkpoint, loaded and, where graphs are captured ahead, captured.
pub fn load(device: &Device, checkpoint: Checkpoint, options: ModelRunnerOptions) -> ModelRunner {
    load_ranks(std::slice::from_ref(device), checkpoint, options)
}

/// As [`load`], with a rank on each device.
pub fn load_ranks(devices: &[Device], checkpoint: Checkpoint, options: ModelRunnerOptions) -> ModelRunner {
    let mut runner =
        ModelRunner::load_ranks(devices, &folder(checkpoint), options, &mut |_| ()).expect("the tiny checkpoint loads");
    runner.capture(&mut |_| ()).expect("every size is captured");
    runner
}
