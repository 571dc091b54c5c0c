//! The conformance rules: what every device must do, one function for each rule, grouped as in the list.
//!
//! Each rule compares values with an eager run or with numbers worked out by hand, bit for bit; "it did not crash" is not
//! a rule. [`GROUPS`] lists them; `conformance_rules!` hands the same list to a macro, so that a test target can make one
//! test of each.

pub mod fixture;
pub mod kernels;

pub mod capture_basics;
pub mod errors;
pub mod healing;
pub mod ladder_and_eligibility;
pub mod live_and_frozen;
pub mod memory;
pub mod outputs;
pub mod padding;
pub mod streams;
pub mod timeline;

use crate::Rule;

/// Hands all rules, by group, to a macro.
#[macro_export]
macro_rules! conformance_rules {
    ($then:ident) => {
        $then! {
            capture_basics {
                no_break_gives_one_segment,
                one_break_gives_two_segments,
                many_breaks_give_one_segment_more,
                a_break_may_come_first,
                a_break_may_come_last,
                two_breaks_may_come_in_a_row,
                breaks_may_stand_everywhere,
                an_empty_segment_costs_no_launch,
                a_break_may_lie_deep_in_the_call_stack,
                a_break_may_be_a_method,
                a_break_may_be_a_generic_function,
                an_annotated_call_outside_a_capture_is_a_plain_call,
                a_disabled_break_is_captured_like_the_code_around_it,
                break_graph_splits_a_segment,
                a_break_inside_a_break_is_a_plain_call,
                a_nested_capture_is_refused_and_the_outer_one_survives,
                two_threads_capture_on_two_streams_at_once,
                the_output_of_a_capture_equals_eager,
                a_capture_ahead_runs_nothing_and_replays_like_eager,
                a_break_that_reads_back_is_captured_ahead_with_a_run,
                equal_segments_share_an_executable,
                only_captured_code_is_capturing,
                a_matrix_product_is_captured_like_a_kernel,
                ten_thousand_segments_are_legal,
            }
            live_and_frozen {
                replay_reads_live_inputs,
                no_host_value_of_the_captured_batch_survives_to_a_replay,
                arguments_of_every_kind_come_back_at_replay,
                a_break_keeps_no_reference_to_the_captured_batch,
                weights_updated_in_place_are_seen_by_replay,
                rebinding_weights_after_capture_is_refused,
                a_kv_pool_made_anew_after_capture_is_refused,
                side_effects_happen_as_often_as_in_eager,
                a_graph_keeps_its_persistent_tensors_alive,
            }
            outputs {
                a_returned_tensor_keeps_its_address,
                tuples_and_structs_cross_a_break,
                other_storage_is_copied_into_the_bridge_and_counted,
                an_argument_that_was_returned_is_never_overwritten,
                outputs_that_changed_places_are_all_carried,
                a_break_may_allocate_differently_at_replay,
                a_changed_output_is_an_error_naming_break_expected_and_got,
                an_output_may_be_written_into_an_argument,
                an_output_may_stay_unused,
                an_output_may_be_used_segments_later,
                dropping_the_handle_does_not_free_the_bridge,
                a_second_replay_refreshes_the_bridge,
                host_values_of_a_break_are_live_at_the_next_break,
                a_returned_host_value_is_that_of_the_last_run,
            }
            memory {
                intermediate_memory_is_reused_within_a_forward,
                falling_sizes_share_memory_and_replay_in_every_order,
                rising_sizes_share_memory_and_replay_in_every_order,
                the_arena_grows_between_captures_without_moving,
                many_sizes_cost_no_more_than_the_largest,
                growth_inside_a_segment_is_refused,
                a_break_may_grow_the_arena,
                an_argument_given_away_is_not_overwritten_early,
                memory_read_on_a_side_stream_of_a_break_is_kept_at_replay,
                the_arena_keeps_to_its_bound,
                sizes_that_would_overflow_are_refused,
                allocating_device_memory_in_a_segment_is_refused,
                a_tensor_of_one_capture_is_refused_in_another,
                a_tensor_is_refused_after_a_later_forward_took_its_memory,
                a_graph_may_be_dropped_while_its_replay_is_queued,
                two_graphs_may_share_one_arena,
                two_arenas_are_independent,
                a_thousand_replays_grow_nothing,
                released_memory_comes_back_with_graphs_intact,
                a_release_ends_the_forward_that_ran_last,
                memory_is_released_while_a_cache_holds_graphs,
                dropping_everything_returns_everything,
            }
            padding {
                valid_rows_do_not_see_the_tail,
                kernels_that_mix_rows_ignore_the_tail,
                the_tail_of_every_bridge_is_scrubbed,
                zero_valid_rows_are_legal,
                an_exact_size_scrubs_nothing,
                more_valid_than_padded_rows_are_refused,
            }
            streams {
                a_segment_may_fork_and_join,
                scopes_may_nest,
                memory_read_on_a_side_stream_is_kept_until_the_join,
                a_segment_may_fork_through_events,
                an_unjoined_side_stream_is_an_error_naming_the_stream,
                side_work_inside_a_break_is_joined_at_its_end,
                waiting_for_work_outside_the_capture_is_an_error,
                work_of_another_stream_during_a_capture_is_unaffected,
                a_side_stream_lives_in_its_scope,
                an_error_inside_a_scope_joins_its_side_streams,
            }
            errors {
                an_error_in_a_break_at_capture_is_located,
                a_panic_in_a_break_at_capture_is_located,
                an_error_in_a_break_at_replay_is_located,
                a_panic_in_a_break_at_replay_is_located,
                an_error_in_captured_code_names_its_segment,
                a_swallowed_error_does_not_make_a_graph,
                an_error_in_an_eager_run_is_returned_as_it_is,
                a_replay_without_a_capture_is_refused,
                nothing_runs_after_the_first_error_of_a_replay,
                the_census_of_breaks_is_checked,
                a_verified_replay_names_the_first_difference,
                the_message_of_each_error_is_pinned,
                a_failing_kernel_is_reported_by_the_next_wait,
            }
            healing {
                healed_chain_and_eager_are_equal,
                a_graph_heals_whatever_way_it_was_captured,
                geometry_and_shared_memory_may_change,
                what_does_not_change_is_not_patched,
                another_sequence_of_work_is_a_chain_once,
                a_break_that_reads_back_stays_and_its_neighbours_merge,
                copies_and_fills_in_a_break_heal,
                a_copy_of_rows_that_moves_is_other_work,
                an_error_while_recording_leaves_the_graph_replayable,
                replays_in_flight_keep_their_arguments,
                patching_does_not_wait_for_a_running_replay,
                a_body_that_leaves_the_record_finds_the_device_as_in_an_eager_run,
                memory_that_another_thread_gives_up_is_kept_for_work_kept_back,
                a_replay_inside_a_break_finds_the_work_before_it_enqueued,
                padded_and_exact_batches_heal,
                a_healed_replay_copies_no_bridge,
            }
            timeline {
                a_timeline_has_each_step_and_each_kernel_once,
                blocks_that_are_held_at_once_lie_apart,
            }
            ladder_and_eligibility {
                padding_is_at_most_an_eighth_above_sixteen_rows,
                sizes_keep_the_alignment_of_the_layers,
                sizes_are_clamped_to_the_chunk,
                an_empty_ladder_with_graphs_asked_for_is_an_error,
                every_reason_to_run_eagerly_is_reached_and_counted,
                a_lazy_cache_captures_at_first_use,
                a_lazy_cache_of_exact_sizes_pads_nothing,
                the_least_recently_used_graph_goes_first,
                graphs_keep_to_their_budget_of_bytes,
                executables_made_at_a_replay_count_against_the_budget,
                a_graph_may_be_evicted_while_it_runs,
                all_sizes_have_the_same_number_of_breaks,
                every_nth_replay_is_verified,
            }
        }
    };
}

macro_rules! groups {
    ($($group:ident { $($rule:ident,)* })*) => {
        /// The rules of each group.
        pub const GROUPS: &[(&str, &[Rule])] = &[$((
            stringify!($group),
            &[$((stringify!($rule), $group::$rule as fn(&bcg_runtime::Device))),*],
        )),*];
    };
}

conformance_rules!(groups);
