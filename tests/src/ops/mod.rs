//! Each op against an independent f64 computation, on random, ragged, padded and row-sliced inputs.
//!
//! A rule is run on the host device and on CUDA; both must stand within the roundings of the dtype.

mod attention;
mod fixture;
mod grouped_linear;
mod linear;
mod linear_few_rows;
mod logits;
mod mamba;
mod mla;
mod moe;
mod norms;
mod qk_norm_rope_kv_write;
mod rows;
mod sampling;
mod ssd_scan;

use attention::{
    decode_attends_to_all_keys, decode_rows_do_not_depend_on_padded_rows, prefill_attends_to_prefix_and_itself,
    prefill_does_not_read_behind_the_batch, prefill_keeps_its_place_between_kernels,
    prefill_rows_do_not_depend_on_other_sequences, prefill_skips_pages_outside_the_cache,
};
use grouped_linear::{
    products_of_experts_have_the_same_bits_in_any_batch, products_of_experts_match_the_formula,
    products_of_experts_serve_any_shares,
};
use linear::{
    linear_gives_the_same_bits_each_time, linear_matches_the_formula, linear_of_nothing_is_zero,
    linear_rows_do_not_depend_on_other_rows, tuned_products_match_the_formula,
};
use linear_few_rows::{
    linear_of_few_rows_has_the_same_bits_for_any_number_of_rows, linear_of_few_rows_matches_the_formula,
    linear_of_few_rows_waits_for_a_computed_weight,
};
use logits::{
    logit_bias_adds_each_value_once, token_mask_excludes_the_tokens_without_a_bit,
    top_logprobs_lists_what_sorting_lists,
};
use mamba::{
    conv1d_continues_each_sequence, conv1d_of_many_rows_matches_the_formula, conv1d_takes_one_token_of_each_sequence,
    replays_on_older_states_are_refused, ssd_scan_continues_each_sequence,
    ssd_scan_of_long_sequences_matches_the_formula, ssm_update_takes_one_token_of_each_sequence,
    time_steps_stay_within_their_limits,
};
use mla::{
    head_linear_multiplies_each_head_with_its_own_weight, mla_decode_attends_to_all_keys,
    mla_decode_rows_do_not_depend_on_padded_rows, mla_kv_write_norms_turns_and_writes_each_token_in_its_slot,
    mla_prefill_attends_to_prefix_and_itself, mla_prefill_gives_the_same_bits_in_any_workspace,
    mla_prefill_keeps_its_place_between_kernels, mla_prefill_rows_do_not_depend_on_other_sequences,
    mla_prefill_skips_pages_outside_the_cache,
};
use moe::{
    a_mixture_of_experts_ignores_padded_rows, grouped_gate_up_matches_the_formula, grouped_linear_matches_the_formula,
    moe_combine_matches_the_formula, moe_permute_keeps_the_order_within_an_expert,
    moe_route_chooses_what_the_formula_chooses, moe_route_takes_the_first_of_equals, the_parts_of_a_mixture_add_up,
};
use norms::{
    add_rms_norm_matches_the_formula, gated_rms_norm_matches_the_formula, relu2_matches_the_formula,
    rms_norm_matches_the_formula, silu_mul_matches_the_formula,
};
use qk_norm_rope_kv_write::{kv_write_copies_each_token_to_its_slot, rope_turns_and_writes_each_token_in_its_slot};
use rows::{
    copy_rows_touches_nothing_else, fill_random_follows_the_formula, fill_reaches_every_dtype,
    fill_reaches_every_element_of_wide_rows, gather_rows_picks_rows, push_rows_copies_what_its_list_says,
    scrub_tail_zeroes_padded_rows_only, unpack_inputs_fills_tokens_and_pages,
};
use sampling::{
    argmax_takes_the_first_of_the_largest, sample_draws_what_the_formula_draws, sample_follows_the_probabilities,
};
use ssd_scan::{
    ssd_scan_goes_on_where_it_stopped, ssd_scan_in_chunks_matches_the_formula, ssd_scan_shares_heads_among_blocks,
};

use crate::Rule;

/// Every rule of the ops.
pub const RULES: &[Rule] = crate::rules![
    prefill_attends_to_prefix_and_itself,
    prefill_skips_pages_outside_the_cache,
    prefill_rows_do_not_depend_on_other_sequences,
    prefill_does_not_read_behind_the_batch,
    prefill_keeps_its_place_between_kernels,
    decode_attends_to_all_keys,
    decode_rows_do_not_depend_on_padded_rows,
    products_of_experts_match_the_formula,
    products_of_experts_serve_any_shares,
    products_of_experts_have_the_same_bits_in_any_batch,
    linear_matches_the_formula,
    linear_rows_do_not_depend_on_other_rows,
    linear_gives_the_same_bits_each_time,
    linear_of_nothing_is_zero,
    tuned_products_match_the_formula,
    linear_of_few_rows_matches_the_formula,
    linear_of_few_rows_has_the_same_bits_for_any_number_of_rows,
    linear_of_few_rows_waits_for_a_computed_weight,
    logit_bias_adds_each_value_once,
    token_mask_excludes_the_tokens_without_a_bit,
    top_logprobs_lists_what_sorting_lists,
    conv1d_continues_each_sequence,
    conv1d_of_many_rows_matches_the_formula,
    conv1d_takes_one_token_of_each_sequence,
    ssd_scan_continues_each_sequence,
    ssd_scan_of_long_sequences_matches_the_formula,
    time_steps_stay_within_their_limits,
    ssm_update_takes_one_token_of_each_sequence,
    replays_on_older_states_are_refused,
    mla_kv_write_norms_turns_and_writes_each_token_in_its_slot,
    head_linear_multiplies_each_head_with_its_own_weight,
    mla_decode_attends_to_all_keys,
    mla_decode_rows_do_not_depend_on_padded_rows,
    mla_prefill_attends_to_prefix_and_itself,
    mla_prefill_skips_pages_outside_the_cache,
    mla_prefill_rows_do_not_depend_on_other_sequences,
    mla_prefill_keeps_its_place_between_kernels,
    mla_prefill_gives_the_same_bits_in_any_workspace,
    moe_route_chooses_what_the_formula_chooses,
    moe_route_takes_the_first_of_equals,
    moe_permute_keeps_the_order_within_an_expert,
    grouped_linear_matches_the_formula,
    grouped_gate_up_matches_the_formula,
    moe_combine_matches_the_formula,
    a_mixture_of_experts_ignores_padded_rows,
    the_parts_of_a_mixture_add_up,
    rms_norm_matches_the_formula,
    add_rms_norm_matches_the_formula,
    silu_mul_matches_the_formula,
    gated_rms_norm_matches_the_formula,
    relu2_matches_the_formula,
    rope_turns_and_writes_each_token_in_its_slot,
    kv_write_copies_each_token_to_its_slot,
    gather_rows_picks_rows,
    push_rows_copies_what_its_list_says,
    unpack_inputs_fills_tokens_and_pages,
    copy_rows_touches_nothing_else,
    fill_reaches_every_dtype,
    fill_random_follows_the_formula,
    fill_reaches_every_element_of_wide_rows,
    scrub_tail_zeroes_padded_rows_only,
    argmax_takes_the_first_of_the_largest,
    sample_draws_what_the_formula_draws,
    sample_follows_the_probabilities,
    ssd_scan_in_chunks_matches_the_formula,
    ssd_scan_shares_heads_among_blocks,
    ssd_scan_goes_on_where_it_stopped,
];
