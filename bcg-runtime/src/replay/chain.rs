//! Chain replay: launch segment, run break, launch segment, …
//!
//! Per replay the host makes no allocation of its own, hashes nothing and holds no lock across a driver call; a break's
//! body and its vectors of arguments are the model author's.

use crate::bridge::scrub;
use crate::capture::catch_panic;
use crate::capture::recorder::place;
use crate::freeze::Thaw;
use crate::graph::Recording;
use crate::segment::{Break, Step};
use crate::{CaptureStream, Eager, Freeze, LiveBatch, Result};

/// Runs the recorded steps and returns the output.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    recording: &Recording<L, O>,
    stream: &mut CaptureStream,
    live: &L,
) -> Result<O> {
    let span = tracing::trace_span!("replay");
    let _entered = span.enter();
    recording.stamps.iter().try_for_each(crate::generation::Stamp::check)?;
    stream.begin_forward(live.rows(), recording.extent_bytes)?;
    stream.poison_extent(recording.extent_bytes)?;
    let mut segment = 0;
    for step in &recording.steps {
        match step {
            Step::Segment(captured) => {
                captured.launch(stream.main()).map_err(|error| error.in_segment(segment))?;
                segment += 1;
            }
            Step::Break(step) => {
                if let Err(error) = run_break(step, stream, live) {
                    stream.arena().end_recorded();
                    stream.reset_forks();
                    return Err(error.in_break(step.site, segment - 1));
                }
            }
        }
    }
    let arena = stream.arena().clone();
    Ok(O::thaw(&recording.output, &Thaw { arena: &arena }))
}

fn run_break<L: LiveBatch>(step: &Break<L>, stream: &mut CaptureStream, live: &L) -> Result<()> {
    let span = tracing::trace_span!("break", name = step.site.name);
    let _entered = span.enter();
    let mut probe = stream.probe.take();
    if let Some(probe) = &mut probe {
        probe.snapshot_args(stream, place(step.site), &step.args)?;
    }
    stream.arena().begin_recorded(&step.blocks);
    let result = catch_panic(|| (step.run)(&mut Eager::from_parts(stream, live)));
    stream.arena().end_recorded();
    stream.probe = probe;
    result?;
    scrub(stream, &step.outputs, live.rows())
}
