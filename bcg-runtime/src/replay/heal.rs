//! Healed replay: segments, and the work of the breaks between them, as one launch.
//!
//! While a break runs, what it enqueues is kept back on the [work list](crate::stream::work_list). Where a span ends,
//! the [`Healer`](super::healer::Healer) patches and launches the merged executable that does this work. If there is
//! none, the work is enqueued as the chain would have done.
//!
//! - A break that reads back, waits, uses a library that launches by itself, or another stream is *not healable*. It
//!   stays a break, and what stands before and after it becomes spans of their own.
//! - Work of another sequence is launched as a chain the first time; then a merged executable is made for it too, up to
//!   a bound for each graph.

use std::sync::Arc;

use super::healer::Healer;
use super::tape::Tape;
use super::{ChainReason, ReplayPath, begin, run_break, thaw_output};
use crate::capture::step::Step;
use crate::device::Stream;
use crate::device::watch::Hold;
use crate::stream::work_list::{self, Active, Origin, Span};
use crate::{Freeze, LiveBatch, OpStream, Result, StepKind};

/// Runs the steps of a tape and returns the output, and whether every span was one launch.
pub(crate) fn replay<L: LiveBatch, O: Freeze>(
    tape: &mut Tape<L, O>,
    stream: &mut OpStream,
    live: &L,
) -> Result<(O, ReplayPath)> {
    let span = tracing::trace_span!("healed replay");
    let _entered = span.enter();
    begin(tape, stream, live)?;
    let main = Arc::clone(stream.main());
    let hold = Hold::begin(main.device());
    let active = Active::begin(tape.healer.take_list(stream.main()), &hold)?;
    let result = run_steps(tape, stream, live);
    stream.arena().end_serving();
    tape.healer.keep_list(active.end());
    drop(hold);
    let path = stream.ended(result)?;
    if path == ReplayPath::Chain(ChainReason::WorkChanged) {
        tape.forget_covered();
    }
    Ok((thaw_output(tape), path))
}

fn run_steps<L: LiveBatch, O: Freeze>(tape: &mut Tape<L, O>, stream: &mut OpStream, live: &L) -> Result<ReplayPath> {
    let Tape { steps, healer, arena, .. } = tape;
    let mut path = ReplayPath::Healed;
    let (mut segment, mut breaks) = (0, 0);
    for (step, what) in steps.iter_mut().enumerate() {
        match what {
            Step::Segment(captured) => {
                segment = captured.index;
                work_list::pass(captured);
            }
            Step::Break(captured) => {
                if captured.not_healable.is_some() {
                    path.note(end_span(healer, stream)?);
                }
                stream.begin_step(StepKind::Break(breaks));
                breaks += 1;
                stream.begin_listing(Origin { step, segment, site: captured.site }, captured.not_healable);
                let ended = run_break(captured, arena, stream, live).and_then(|()| stream.end_listing());
                let left = ended.inspect_err(|_| stream.reset_forks());
                let left = left.map_err(|error| error.in_break(captured.site, segment))?;
                stream.end_step();
                if let (Some(why), None) = (left, captured.not_healable) {
                    tracing::debug!(name = captured.site.name, why, "a break cannot be healed any more");
                    captured.not_healable = Some(why);
                    healer.forget_break_after(segment);
                    path.note(Some(ChainReason::BreakLeft));
                }
            }
        }
    }
    path.note(end_span(healer, stream)?);
    Ok(path)
}

fn end_span(healer: &mut Healer, stream: &mut OpStream) -> Result<Option<ChainReason>> {
    let launch = |span: &Span, main: &Arc<Stream>| {
        if let Some(kind) = span.step_kind() {
            stream.begin_step(kind);
        }
        let ended = healer.launch(span, main);
        stream.end_step();
        ended
    };
    work_list::end_span(launch).unwrap_or(Ok(None))
}
