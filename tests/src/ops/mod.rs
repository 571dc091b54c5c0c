//! Each op against an independent f64 computation, on random, ragged, padded and row-sliced inputs.
//!
//! A rule is run on the host device and on CUDA; both must stand within the roundings of the dtype.

mod attention;
mod fixture;
mod linear;
mod norms;
mod qk_norm_rope_kv_write;
mod rows;
mod sampling;

use crate::Rule;

/// Every rule of the ops.
pub const RULES: &[Rule] = &[
    ("ops::rms_norm_matches_the_formula", norms::rms_norm_matches_the_formula),
    ("ops::add_rms_norm_matches_the_formula", norms::add_rms_norm_matches_the_formula),
    ("ops::silu_mul_matches_the_formula", norms::silu_mul_matches_the_formula),
    ("ops::linear_matches_the_formula", linear::linear_matches_the_formula),
    ("ops::linear_rows_do_not_depend_on_other_rows", linear::linear_rows_do_not_depend_on_other_rows),
    (
        "ops::rope_turns_and_writes_each_token_in_its_slot",
        qk_norm_rope_kv_write::rope_turns_and_writes_each_token_in_its_slot,
    ),
    ("ops::prefill_attends_to_prefix_and_itself", attention::prefill_attends_to_prefix_and_itself),
    ("ops::prefill_rows_do_not_depend_on_other_sequences", attention::prefill_rows_do_not_depend_on_other_sequences),
    ("ops::decode_attends_to_all_keys", attention::decode_attends_to_all_keys),
    ("ops::embedding_looks_up_rows", rows::embedding_looks_up_rows),
    ("ops::gather_rows_picks_rows", rows::gather_rows_picks_rows),
    ("ops::copy_rows_touches_nothing_else", rows::copy_rows_touches_nothing_else),
    ("ops::fill_reaches_every_dtype", rows::fill_reaches_every_dtype),
    ("ops::scrub_tail_zeroes_padded_rows_only", rows::scrub_tail_zeroes_padded_rows_only),
    ("ops::argmax_takes_the_first_of_the_largest", sampling::argmax_takes_the_first_of_the_largest),
    ("ops::sample_draws_what_the_formula_draws", sampling::sample_draws_what_the_formula_draws),
    ("ops::sample_follows_the_probabilities", sampling::sample_follows_the_probabilities),
];
