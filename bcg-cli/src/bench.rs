//! `bcg bench`: the flags of each bench, and of the engine that it times.

use std::path::PathBuf;

use bcg_benches::report::Report;
use bcg_benches::{capture, decode, engine, kernels, lazy, prefill, prompt, replay, serve};
use clap::{Args, Subcommand};

use crate::args::{DeviceArgs, EngineArgs};

/// Flags of `bcg bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to time.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What `bcg bench` can time.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Each op at the shapes of models, beside the machine's ceilings
    Kernels(With<DeviceArgs, kernels::KernelsArgs>),
    /// The forward of one request, by its length
    Prefill(With<EngineArgs, prefill::PrefillArgs>),
    /// The first token of one long prompt that the engine computes in chunks, by its length
    Prompt(With<EngineArgs, prompt::PromptArgs>),
    /// The forward of a batch with one new token for each sequence, by the batch's size
    Decode(With<EngineArgs, decode::DecodeArgs>),
    /// The captures of all sizes, and the memory they take
    Capture(With<EngineArgs, capture::CaptureArgs>),
    /// The captures of new sizes while their first batches are served
    Lazy(With<EngineArgs, lazy::LazyArgs>),
    /// The host's time for prefills, healed and as a chain
    Replay(With<EngineArgs, replay::ReplayArgs>),
    /// What the GPU does while the engine serves: how busy it is, and how long it waits between steps
    Engine(With<EngineArgs, engine::EngineBenchArgs>),
    /// A server under load: throughput, time to first token, time between tokens
    Serve(serve::ServeArgs),
}

/// Flags of what is timed, and those of the bench.
#[derive(Debug, Args)]
pub struct With<T: Args, B: Args> {
    /// Flags of what is timed; a bench that needs graphs turns them on whatever these say.
    #[command(flatten)]
    pub timed: T,

    /// Flags of the bench.
    #[command(flatten)]
    pub bench: B,
}

/// Runs the command.
///
/// # Errors
/// What is wrong with the flags or the model; that something timed failed.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let (report, path) = measure(&args.command)?;
    report.publish(path.as_deref())
}

fn measure(command: &BenchCommand) -> anyhow::Result<(Report, &Option<PathBuf>)> {
    use BenchCommand::{Capture, Decode, Engine, Kernels, Lazy, Prefill, Prompt, Replay, Serve};
    Ok(match command {
        Kernels(With { timed, bench }) => (kernels::measure(timed.device, bench)?, &bench.rounds.json),
        Prefill(With { timed, bench }) => (prefill::measure(&timed.options(), bench)?, &bench.rounds.json),
        Prompt(With { timed, bench }) => (prompt::measure(&timed.options(), bench)?, &bench.json),
        Decode(With { timed, bench }) => (decode::measure(&timed.options(), bench)?, &bench.rounds.json),
        Capture(With { timed, bench }) => (capture::measure(&timed.options())?, &bench.json),
        Lazy(With { timed, bench }) => (lazy::measure(&timed.options(), bench)?, &bench.json),
        Replay(With { timed, bench }) => (replay::measure(&timed.options(), bench)?, &bench.rounds.json),
        Engine(With { timed, bench }) => (engine::measure(&timed.options(), bench)?, &bench.json),
        Serve(bench) => (serve::measure(bench)?, &bench.json),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::Value;

    use super::*;
    use crate::{Cli, Command};

    /// Runs `bcg bench` on the host device and returns its JSON.
    fn bench(flags: &[&str]) -> anyhow::Result<Value> {
        const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
        let line = ["bcg", "bench"].iter().chain(flags).chain(&["--device", "host", "--model", MODEL]);
        let Command::Bench(args) = Cli::try_parse_from(line)?.command else { unreachable!("the line says bench") };
        let (report, _) = measure(&args.command)?;
        assert!(report.text().starts_with("device host:"), "{}", report.text());
        Ok(report.json())
    }

    fn rows<'a>(report: &'a Value, table: &str) -> Vec<&'a Value> {
        let rows = report["rows"].as_array().expect("rows");
        rows.iter().filter(|row| row["name"] == table).collect()
    }

    #[track_caller]
    fn positive(row: &Value, columns: &[&str]) {
        for column in columns {
            assert!(row[column].as_f64().is_some_and(|number| number > 0.0), "{column} of {row}");
        }
    }

    const FORWARD: [&str; 5] =
        ["graph_ms_p50", "eager_ms_p10", "step_ms_p90", "graph_host_ms_p50", "eager_host_ms_p50"];

    #[test]
    fn prefill_times_each_size_with_graphs_and_eagerly() {
        let report = bench(&["prefill", "--sizes", "1,20", "--rounds", "4"]).expect("times");
        let rows = rows(&report, "prefill");
        assert_eq!(rows.iter().map(|row| &row["tokens"]).collect::<Vec<_>>(), [1, 20]);
        for row in rows {
            positive(row, &FORWARD);
            assert_eq!(row["rounds"], 4);
            assert!(row["graph_host_ms_p50"].as_f64() <= row["graph_ms_p50"].as_f64(), "{row}");
        }
    }

    #[test]
    fn decode_times_each_batch_at_its_context() {
        let report = bench(&["decode", "--batches", "3,1", "--context", "40", "--rounds", "3"]).expect("times");
        let rows = rows(&report, "decode");
        assert_eq!(rows.iter().map(|row| &row["batch"]).collect::<Vec<_>>(), [3, 1]);
        rows.into_iter().for_each(|row| positive(row, &FORWARD));
        assert!(report["notes"][0].as_str().is_some_and(|note| note.contains("of 40 tokens")), "{report}");
    }

    #[test]
    fn prompt_times_the_first_token_of_prompts_in_chunks() {
        let flags = ["prompt", "--tokens", "50,90", "--rounds", "2", "--pp", "2"];
        let report = bench(&[&flags[..], &["--max-running-requests", "4", "--chunked-prefill-size", "16"]].concat());
        let report = report.expect("times");
        let rows = rows(&report, "prompt");
        assert_eq!(rows.iter().map(|row| &row["tokens"]).collect::<Vec<_>>(), [50, 90]);
        rows.iter().for_each(|row| positive(row, &["first_token_ms_p50", "tokens_per_s"]));
        assert_eq!((&rows[0]["pp"], &rows[0]["chunk"]), (&2.into(), &16.into()));
        let error = bench(&["prompt", "--rounds", "0"]).expect_err("no round").to_string();
        assert!(error.starts_with("--rounds"), "{error}");
    }

    #[test]
    fn capture_times_every_size_and_their_sum() {
        let sizes = ["--cuda-graph-sizes", "2,20", "--cuda-graph-decode-sizes", "1,4"];
        let report = bench(&[&["capture"], &sizes[..]].concat()).expect("captures");
        let sizes = rows(&report, "capture of a size");
        assert_eq!(sizes.iter().map(|row| &row["size"]).collect::<Vec<_>>(), [20, 2, 4, 1]);
        assert_eq!(sizes.iter().filter(|row| row["phase"] == "decode").count(), 2);
        sizes.iter().for_each(|row| positive(row, &["ms", "arena_bytes"]));
        let total = rows(&report, "capture")[0];
        assert_eq!(
            (&total["prefill_sizes"], &total["decode_sizes"], &total["breaks"]),
            (&2.into(), &2.into(), &4.into())
        );
        let sum: f64 = sizes.iter().filter_map(|row| row["ms"].as_f64()).sum();
        let total_ms = total["seconds"].as_f64().expect("seconds") * 1e3;
        assert!((sum - total_ms).abs() < 1e-6 * total_ms, "{sum} ms of {total_ms} ms");
    }

    #[test]
    fn lazy_times_the_captures_of_new_sizes() {
        let report = bench(&["lazy", "--sizes", "5,20", "--rounds", "5"]).expect("captures");
        let rounds: Vec<_> = rows(&report, "lazy").iter().map(|row| &row["rounds"]).collect();
        assert_eq!(rounds, [4, 5], "sizes 5..2 and 20..16");
        rows(&report, "lazy")
            .into_iter()
            .for_each(|row| positive(row, &["capture_ms_p50", "eager_ms_p50", "graph_ms_p50"]));
        assert_eq!(rows(&report, "graphs")[0]["captures"], 9);
        let error = bench(&["lazy", "--sizes", "20,19"]).expect_err("19 is captured by then").to_string();
        assert!(error.contains("further apart"), "{error}");
    }

    #[test]
    fn replay_times_both_ways() {
        let report = bench(&["replay", "--sizes", "8,20", "--rounds", "5"]).expect("times");
        let replays = rows(&report, "replay");
        assert_eq!(replays.iter().map(|row| &row["tokens"]).collect::<Vec<_>>(), [8, 20]);
        for row in replays {
            positive(row, &["healed_us_p50", "chain_us_p50", "step_us_p50"]);
            assert_eq!(row["patched_nodes"], 0, "what breaks launch does not depend on the batch: {row}");
        }
    }

    #[test]
    fn kernels_times_every_op_beside_its_ceiling_and_a_peer() {
        let peers = std::env::temp_dir().join(format!("bcg-peers-{}.json", std::process::id()));
        std::fs::write(&peers, r#"{"us": {"rms_norm/tiny-qwen3/T=3": 1e9}}"#).expect("a writable temporary folder");
        let shapes = ["--tokens", "3", "--logits", "2", "--prefill", "2x4,1x3+20", "--decode", "2x20"];
        let flags = ["kernels", "--rounds", "3", "--peers", peers.to_str().expect("UTF-8")];
        let report = bench(&[&flags[..], &shapes[..]].concat()).expect("times");
        std::fs::remove_file(peers).expect("the file is there");
        positive(rows(&report, "ceilings")[0], &["copy_gb_per_s", "product_tflop_per_s"]);
        let rows = rows(&report, "kernels");
        assert_eq!(rows.len(), 5 + 4 + 2 + 1 + 3);
        for row in &rows {
            positive(row, &["us_p50", "percent", "gb_per_s"]);
            assert_eq!(
                row["tflop_per_s"].is_number(),
                ["linear", "attention_prefill", "attention_decode"].contains(&row["op"].as_str().unwrap())
            );
        }
        let with_peer: Vec<_> = rows.iter().filter(|row| row["peer_us"].is_number()).collect();
        assert_eq!((with_peer.len(), &with_peer[0]["op"]), (1, &"rms_norm".into()));
        positive(with_peer[0], &["peer_ratio"]);
    }

    #[test]
    fn sizes_that_cannot_be_timed_are_refused_by_flag() {
        let error = bench(&["prefill", "--sizes", "1", "--profile"]).expect_err("no GPU");
        assert!(format!("{error:#}").starts_with("--profile"), "{error:#}");
        for (flags, flag) in [
            (["prefill", "--sizes", "1,0"], "--sizes"),
            (["decode", "--batches", "0"], "--batches"),
            (["decode", "--context", "0"], "--context"),
            (["kernels", "--tokens", "0"], "--tokens"),
            (["kernels", "--op", "nonsense"], "--op"),
            (["prefill", "--rounds", "0"], "--rounds"),
        ] {
            let error = bench(&flags).expect_err(flag).to_string();
            assert!(error.starts_with(flag), "{error}");
        }
    }
}
