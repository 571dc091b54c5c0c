//! Chain replay: launch segment, run break, launch segment, …
//!
//! Per replay the host makes no allocation of its own, hashes nothing and holds no lock across a driver call; a break's
//! body and its vectors of arguments are the model author's.

use super::{begin, run_break, thaw_output};
use crate::capture::step::Step;
use crate::graph::Recording;
use crate::{Freeze, LiveBatch, OpStream, Result, StepKind};

/// Runs the recorded steps and returns the output.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    recording: &Recording<L, O>,
    stream: &mut OpStream,
    live: &L,
) -> Result<O> {
    let span = tracing::trace_span!("chain replay");
    let _entered = span.enter();
    begin(recording, stream, live)?;
    let result = run_steps(recording, stream, live);
    stream.arena().end_recorded();
    result.map(|()| thaw_output(recording))
}

fn run_steps<L: LiveBatch, O: Freeze>(recording: &Recording<L, O>, stream: &mut OpStream, live: &L) -> Result<()> {
    let (mut segment, mut breaks) = (0, 0);
    for step in &recording.steps {
        match step {
            Step::Segment(captured) => {
                stream.begin_step(StepKind::Segment(segment));
                captured.launch(stream.main()).map_err(|error| error.in_segment(segment))?;
                segment += 1;
            }
            Step::Break(step) => {
                stream.begin_step(StepKind::Break(breaks));
                if let Err(error) = run_break(step, &recording.arena, stream, live) {
                    stream.reset_forks();
                    return Err(error.in_break(step.site, segment - 1));
                }
                breaks += 1;
            }
        }
        stream.end_step();
    }
    Ok(())
}
