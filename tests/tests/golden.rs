//! The golden rules on the host device; the `gpu` binary runs them on CUDA.

use bcg_runtime::Device;
use bcg_tests::golden;

/// One test for each rule and checkpoint: they run beside each other, and say which one failed.
macro_rules! tests {
    ($($module:ident = $checkpoint:literal),* => $rules:tt) => {
        $(mod $module { tests!(@rules $checkpoint $rules); })*

        /// A checkpoint that is listed but has no test here would run on CUDA only.
        #[test]
        fn every_checkpoint_has_its_tests() {
            assert_eq!(golden::CHECKPOINTS, [$($checkpoint),*]);
        }
    };
    (@rules $checkpoint:literal { $($rule:ident,)* }) => {
        $(
            #[test]
            fn $rule() {
                super::golden::$rule(&super::Device::host(), $checkpoint);
            }
        )*

        #[test]
        fn every_rule_has_its_test() {
            let listed: Vec<&str> = super::golden::RULES.iter().map(|(name, _)| *name).collect();
            assert_eq!(listed, [$(stringify!($rule)),*]);
        }
    };
}

tests! {
    qwen3 = "tiny-qwen3",
    qwen3_moe = "tiny-qwen3-moe",
    nemotron_h = "tiny-nemotron-h",
    deepseek_v3 = "tiny-deepseek-v3"
=> {
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
