//! `bcg inspect`: what a captured size consists of, and where the time and the memory of its forward go.

mod html;
mod memory;
mod table;
mod trace;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use bcg_benches::progress::LoadBar;
use bcg_benches::sequences::Sequences;
use bcg_engine::{CaptureMode, EngineOptions, load};
use bcg_models::{ModelRunner, Phase};
use bcg_runtime::{Description, StepTime, Timeline};
use clap::Args;

use crate::args::EngineArgs;

/// Tokens that each sequence of a decode has in the KV cache already.
const DECODE_PAST: usize = 127;

/// Flags of `bcg inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Flags of the engine; graphs are on whatever they say.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Tokens of the prefill to capture, or sequences of the decode
    #[arg(long, value_name = "N")]
    pub size: usize,

    /// Capture a decode instead of a prefill
    #[arg(long)]
    pub decode: bool,

    /// Print JSON
    #[arg(long, conflicts_with = "dot")]
    pub json: bool,

    /// Print a Graphviz digraph
    #[arg(long)]
    pub dot: bool,

    /// Replay and write the timeline of a forward as a page for a browser
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,

    /// Replay and write the timeline of a forward as a Chrome trace, which Perfetto shows
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// A captured size and a forward of it.
struct Inspected {
    model: String,
    device: String,
    phase: Phase,
    size: usize,
    description: Description,
    timeline: Timeline,
}

impl Inspected {
    /// The host's steps that are drawn: those of the replay in which the GPU was watched, if it was.
    fn drawn_steps(&self) -> &[StepTime] {
        self.timeline.gpu.as_ref().map_or(&self.timeline.steps, |gpu| &gpu.steps)
    }
}

/// Drops what is finer than a nanosecond.
fn rounded(us: f64) -> f64 {
    (us * 1e3).round() / 1e3
}

/// Runs the command.
///
/// # Errors
/// What is wrong with the flags or the model, that the capture or the replay failed, or that a file cannot be written.
pub fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let phase = if args.decode { Phase::Decode } else { Phase::Prefill };
    let options = options(args, phase)?;
    let mut runner = load::load_runner(&options, &mut LoadBar::show())?;
    let is_timed = args.html.is_some() || args.trace.is_some();
    let timeline = is_timed.then(|| timeline(&mut runner, phase, args.size)).transpose()?;
    let description = runner.describe(phase, args.size).context("the size was not captured")?;
    let text = if args.json {
        serde_json::to_string_pretty(&table::to_json(args.size, &description))? + "\n"
    } else if args.dot {
        table::to_dot(&description)
    } else {
        table::to_table(&description)
    };
    if let Some(timeline) = timeline {
        let (model, device) = (load::folder_name(&options.model), runner.device().name().to_owned());
        let inspected = Inspected { model, device, phase, size: args.size, description, timeline };
        if let Some(file) = &args.html {
            write("--html", file, &html::page(&inspected))?;
        }
        if let Some(file) = &args.trace {
            write("--trace", file, &trace::trace(&inspected).to_string())?;
        }
    }
    print!("{text}");
    Ok(())
}

/// The engine with this one size.
fn options(args: &InspectArgs, phase: Phase) -> anyhow::Result<EngineOptions> {
    ensure!(args.size > 0, "--size: 0 tokens is no size; give at least 1");
    let is_timed = args.html.is_some() || args.trace.is_some();
    ensure!(
        args.decode || args.size > 1 || !is_timed,
        "--size 1: one new token runs as a decode; add --decode to see its timeline"
    );
    let mut options = args.engine.options();
    options.enable_breakable_cuda_graph = true;
    options.check()?;
    ensure!(
        args.size <= options.chunked_prefill_size,
        "--size: {} is above the {} tokens of a step; raise --chunked-prefill-size",
        args.size,
        options.chunked_prefill_size
    );
    options.capture = CaptureMode::Ahead;
    (options.cuda_graph_lazy_max_graphs, options.cuda_graph_lazy_max_mib) = (None, None);
    let size_if = |wanted| if phase == wanted { args.size } else { 1 };
    options.cuda_graph_sizes = Some(vec![size_if(Phase::Prefill)]);
    options.cuda_graph_decode_sizes = Some(vec![size_if(Phase::Decode)]);
    options.cuda_graph_max_tokens = None;
    options.max_running_requests = options.max_running_requests.max(size_if(Phase::Decode));
    Ok(options)
}

/// Replays one request of `size` tokens, or one new token for each of `size` sequences.
fn timeline(runner: &mut ModelRunner, phase: Phase, size: usize) -> anyhow::Result<Timeline> {
    let sequences = match phase {
        Phase::Prefill => Sequences::new(runner, 1, size, 0),
        Phase::Decode => Sequences::new(runner, size, 1, DECODE_PAST.min(runner.options().context_length - 1)),
    };
    let sequences = sequences.context("the KV cache is too small for this size; raise --kv-cache-tokens")?;
    Ok(runner.timeline(&sequences.inputs())?)
}

fn write(flag: &str, file: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(file, text).with_context(|| format!("{flag}: cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bcg_runtime::{BlockLifetime, BreakDescription, GpuTimeline, KernelTime, Moment, SegmentDescription, StepKind};

    use super::*;

    /// Two segments around one break; watched, or not.
    pub(super) fn inspected(with_gpu: bool) -> Inspected {
        let segment = |kernels: &[&'static str]| SegmentDescription {
            is_empty: kernels.is_empty(),
            num_nodes: kernels.len(),
            num_copies: 0,
            num_fills: 0,
            kernels: kernels.to_vec(),
        };
        let one = BreakDescription {
            name: "attend",
            file: "a</script><b>.rs",
            line: 7,
            after_segment: 0,
            num_launches: 1,
            num_args: 2,
            bridge_bytes: 4096,
            not_healable: Some("a read-back"),
            num_patched: 0,
        };
        let moment = |step, order| Moment { step, order };
        let block = |offset, bytes, from, to| BlockLifetime { offset, bytes, from, to };
        let description = Description {
            name: "prefill of 64 rows".to_owned(),
            segments: vec![segment(&["rms_norm", "matmul"]), segment(&["matmul"])],
            breaks: vec![one],
            num_merged: 0,
            extent_bytes: 1536,
            blocks: vec![
                block(0, 512, moment(0, 0), moment(0, 2)),
                block(512, 1024, moment(0, 1), moment(3, 0)),
                block(0, 256, moment(1, 0), moment(2, 0)),
            ],
            capture_time: Duration::from_millis(2),
        };
        let step = |kind, begin_us, duration_us| StepTime { kind, begin_us, duration_us };
        let steps = vec![
            step(StepKind::Segment(0), 1.0, 4.0),
            step(StepKind::Break(0), 5.0, 6.0),
            step(StepKind::Segment(1), 11.0, 3.0),
        ];
        let kernel = |name: &str, begin_us, duration_us, step: usize| KernelTime {
            name: name.to_owned(),
            rank: 0,
            stream_id: 7,
            wait_us: None,
            begin_us,
            duration_us,
            step: Some(step),
            part: Some(steps[step].kind),
        };
        let kernels =
            vec![kernel("rms_norm", 6.0, 2.0, 0), kernel("attention", 12.0, 5.0, 1), kernel("matmul", 17.0, 1.0, 2)];
        let gpu = if with_gpu {
            Ok(GpuTimeline { steps: steps.clone(), kernels })
        } else {
            Err("host:0 runs no kernel on a GPU".to_owned())
        };
        let timeline = Timeline { steps, host_us: 15.0, wall_us: 20.0, gpu };
        Inspected {
            model: "tiny".to_owned(),
            device: "host:0".to_owned(),
            phase: Phase::Prefill,
            size: 64,
            description,
            timeline,
        }
    }
}
