//! Each op against an independent f64 computation, on random, ragged, padded and row-sliced inputs.
//!
//! A rule is run on the host device and on CUDA; both must stand within the roundings of the dtype.

mod attention;
mod fixture;
mod linear;
mod linear_few_rows;
mod mla;
mod norms;
mod qk_norm_rope_kv_write;
mod rows;
mod sampling;

use attention::{
    decode_attends_to_all_keys, decode_rows_do_not_depend_on_padded_rows, prefill_attends_to_prefix_and_itself,
    prefill_does_not_read_behind_the_batch, prefill_keeps_its_place_between_kernels,
    prefill_rows_do_not_depend_on_other_sequences, prefill_skips_pages_outside_the_cache,
};
use linear::{
    linear_gives_the_same_bits_each_time, linear_matches_the_formula, linear_of_nothing_is_zero,
    linear_rows_do_not_depend_on_other_rows, tuned_products_match_the_formula,
};
use linear_few_rows::{
    linear_of_few_rows_has_the_same_bits_for_any_number_of_rows, linear_of_few_rows_matches_the_formula,
    linear_of_few_rows_waits_for_a_computed_weight,
};
use mla::{
    head_linear_multiplies_each_head_with_its_own_weight, mla_decode_attends_to_all_keys,
    mla_decode_rows_do_not_depend_on_padded_rows, mla_kv_write_norms_turns_and_writes_each_token_in_its_slot,
    mla_prefill_attends_to_prefix_and_itself, mla_prefill_gives_the_same_bits_in_any_workspace,
    mla_prefill_keeps_its_place_between_kernels, mla_prefill_rows_do_not_depend_on_other_sequences,
    mla_prefill_skips_pages_outside_the_cache,
};
use norms::{add_rms_norm_matches_the_formula, rms_norm_matches_the_formula, silu_mul_matches_the_formula};
use qk_norm_rope_kv_write::rope_turns_and_writes_each_token_in_its_slot;
use rows::{
    copy_rows_touches_nothing_else, fill_random_follows_the_formula, fill_reaches_every_dtype,
    fill_reaches_every_element_of_wide_rows, gather_rows_picks_rows, scrub_tail_zeroes_padded_rows_only,
};
use sampling::{
    argmax_takes_the_first_of_the_largest, sample_draws_what_the_formula_draws, sample_follows_the_probabilities,
};

use crate::Rule;

/// Every rule of the ops.
pub const RULES: &[Rule] = crate::rules![
    rms_norm_matches_the_formula,
    add_rms_norm_matches_the_formula,
    silu_mul_matches_the_formula,
    linear_matches_the_formula,
    linear_rows_do_not_depend_on_other_rows,
    linear_gives_the_same_bits_each_time,
    linear_of_nothing_is_zero,
    tuned_products_match_the_formula,
    linear_of_few_rows_matches_the_formula,
    linear_of_few_rows_has_the_same_bits_for_any_number_of_rows,
    linear_of_few_rows_waits_for_a_computed_weight,
    rope_turns_and_writes_each_token_in_its_slot,
    prefill_attends_to_prefix_and_itself,
    prefill_rows_do_not_depend_on_other_sequences,
    prefill_skips_pages_outside_the_cache,
    prefill_does_not_read_behind_the_batch,
    prefill_keeps_its_place_between_kernels,
    decode_attends_to_all_keys,
    decode_rows_do_not_depend_on_padded_rows,
    mla_kv_write_norms_turns_and_writes_each_token_in_its_slot,
    head_linear_multiplies_each_head_with_its_own_weight,
    mla_decode_attends_to_all_keys,
    mla_decode_rows_do_not_depend_on_padded_rows,
    mla_prefill_attends_to_prefix_and_itself,
    mla_prefill_skips_pages_outside_the_cache,
    mla_prefill_rows_do_not_depend_on_other_sequences,
    mla_prefill_keeps_its_place_between_kernels,
    mla_prefill_gives_the_same_bits_in_any_workspace,
    gather_rows_picks_rows,
    copy_rows_touches_nothing_else,
    fill_reaches_every_dtype,
    fill_random_follows_the_formula,
    fill_reaches_every_element_of_wide_rows,
    scrub_tail_zeroes_padded_rows_only,
    argmax_takes_the_first_of_the_largest,
    sample_draws_what_the_formula_draws,
    sample_follows_the_probabilities,
];
