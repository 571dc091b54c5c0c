//! Chain replay: launch segment, run break, launch segment, …
//!
//! Per replay the host makes no allocation of its own, hashes nothing and holds no lock across a driver call; a break's
//! body and its vectors of arguments are the model author's.

use super::tape::Tape;
use super::{begin, run_break, thaw_output};
use crate::capture::step::Step;
use crate::{Freeze, LiveBatch, OpStream, Result, StepKind};

/// Runs the steps of a tape and returns the output.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(tape: &Tape<L, O>, stream: &mut OpStream, live: &L) -> Result<O> {
    let span = tracing::trace_span!("chain replay");
    let _entered = span.enter();
    if let Some(ranks) = stream.ranks() {
        ranks.come("a replay as a chain")?;
    }
    begin(tape, stream, live)?;
    let result = run_steps(tape, stream, live);
    stream.arena().end_serving();
    stream.ended(result).map(|()| thaw_output(tape))
}

fn run_steps<L: LiveBatch, O: Freeze>(tape: &Tape<L, O>, stream: &mut OpStream, live: &L) -> Result<()> {
    let (mut segment, mut breaks) = (0, 0);
    for step in &tape.steps {
        match step {
            Step::Segment(captured) => {
                stream.begin_step(StepKind::Segment(segment));
                captured.launch(stream.main()).map_err(|error| error.in_segment(segment))?;
                segment += 1;
            }
            Step::Break(step) => {
                stream.begin_step(StepKind::Break(breaks));
                if let Err(error) = run_break(step, &tape.arena, stream, live) {
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
