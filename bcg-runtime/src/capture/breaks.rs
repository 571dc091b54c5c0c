//! What a call of an annotated function does: a plain call outside a capture, a break inside of one.

use super::writer::TapeWriter;
use crate::arena::Arena;
use crate::break_site::BreakSite;
use crate::capture::bridge::{Bridges, Carrier, scrub, scrub_output};
use crate::capture::freeze::{Freezer, Thaw};
use crate::capture::step::Break;
use crate::device::watch::Needs;
use crate::error::catch_panic;
use crate::generation::Stamp;
use crate::stream::work_list::Origin;
use crate::{Bridge, Context, Eager, LiveBatch, OpStream, Result};

const RANK_COUPLED: &str = "a rank-coupled break";

/// Calls the body of a function whose annotation is switched off.
pub fn plain_call<L: LiveBatch, R>(
    cx: &mut Context<'_, L>,
    run: impl FnOnce(&mut Eager<'_, L>) -> Result<R>,
) -> Result<R> {
    // Inside a segment the body's work is captured like that of any other function.
    run(&mut Eager::from_parts(cx.stream, cx.live))
}

/// Calls an annotated function. `replay` thaws the arguments and calls the body.
pub fn eager_break<L: LiveBatch, F: Send + Sync + 'static, R: Bridge>(
    cx: &mut Context<'_, L>,
    site: &'static BreakSite,
    freeze: impl FnOnce(&mut Freezer<'_>) -> Result<F>,
    run: impl FnOnce(&mut Eager<'_, L>) -> Result<R>,
    replay: impl Fn(&mut Eager<'_, L>, &F, &Thaw<'_>) -> Result<R> + Send + Sync + 'static,
) -> Result<R> {
    match cx.writer.take() {
        None => call(cx, site, freeze, run),
        Some(writer) => {
            let result = capture(writer, cx, site, freeze, run, replay);
            cx.writer = Some(writer);
            result
        }
    }
}

/// Calls an annotated function that has a stub: the stub runs at capture, the body at every other time.
pub fn eager_break_stubbed<L: LiveBatch, F: Send + Sync + 'static, R: Bridge>(
    cx: &mut Context<'_, L>,
    site: &'static BreakSite,
    freeze: impl FnOnce(&mut Freezer<'_>) -> Result<F>,
    run: impl FnOnce(&mut Eager<'_, L>) -> Result<R>,
    stub: impl FnOnce(&mut Eager<'_, L>) -> Result<R>,
    replay: impl Fn(&mut Eager<'_, L>, &F, &Thaw<'_>) -> Result<R> + Send + Sync + 'static,
) -> Result<R> {
    if cx.writer.is_some() {
        eager_break(cx, site, freeze, stub, replay)
    } else {
        eager_break(cx, site, freeze, run, replay)
    }
}

/// Outside a capture: a plain call, with the same padding rule as at replay.
fn call<L: LiveBatch, F, R: Bridge>(
    cx: &mut Context<'_, L>,
    site: &'static BreakSite,
    freeze: impl FnOnce(&mut Freezer<'_>) -> Result<F>,
    run: impl FnOnce(&mut Eager<'_, L>) -> Result<R>,
) -> Result<R> {
    // A nested break is not a place of its own in the comparison of a replay with an eager run.
    let mut probe = cx.stream.probe.take();
    if let Some(probe) = &mut probe {
        let mut freezer = Freezer::new(cx.stream);
        freeze(&mut freezer)?;
        let args = freezer.tensors;
        probe.snapshot_args(cx.stream.main(), site.to_string(), &args)?;
    }
    let result = come(cx.stream, site).and_then(|()| run(&mut Eager::new(cx)));
    cx.stream.probe = probe;
    let output = result?;
    scrub_output(cx.stream, &output, cx.live.rows())?;
    Ok(output)
}

/// During a capture: ends the segment, runs the body eagerly, keeps what a replay needs, begins the next segment.
fn capture<L: LiveBatch, F: Send + Sync + 'static, R: Bridge>(
    writer: &mut TapeWriter<L>,
    cx: &mut Context<'_, L>,
    site: &'static BreakSite,
    freeze: impl FnOnce(&mut Freezer<'_>) -> Result<F>,
    run: impl FnOnce(&mut Eager<'_, L>) -> Result<R>,
    replay: impl Fn(&mut Eager<'_, L>, &F, &Thaw<'_>) -> Result<R> + Send + Sync + 'static,
) -> Result<R> {
    writer.begin_break(cx.stream, &site.to_string())?;
    let segment = writer.segment_index();
    let span = tracing::debug_span!("break", name = site.name, segment);
    cx.stream.begin_listing(Origin { step: writer.steps.len(), segment, site }, None);
    if site.is_rank_coupled {
        // The body, which runs at each replay, is not the stub that is listed now.
        cx.stream.leave_list(RANK_COUPLED, Needs::Nothing)?;
    }
    let captured = span.in_scope(|| run_captured(cx, site, freeze, run, replay));
    match captured {
        Ok((output, step, stamps)) => {
            writer.stamps.extend(stamps);
            writer.end_break(cx.stream, Some(step))?;
            Ok(output)
        }
        Err(error) => {
            writer.abort(cx.stream);
            Err(error.in_break(site, segment))
        }
    }
}

fn run_captured<L: LiveBatch, F: Send + Sync + 'static, R: Bridge>(
    cx: &mut Context<'_, L>,
    site: &'static BreakSite,
    freeze: impl FnOnce(&mut Freezer<'_>) -> Result<F>,
    run: impl FnOnce(&mut Eager<'_, L>) -> Result<R>,
    replay: impl Fn(&mut Eager<'_, L>, &F, &Thaw<'_>) -> Result<R> + Send + Sync + 'static,
) -> Result<(R, Break<L>, Vec<Stamp>)> {
    let mut freezer = Freezer::new(cx.stream);
    let frozen = freeze(&mut freezer)?;
    let (args, stamps) = (freezer.tensors, freezer.stamps);
    let launches_before = cx.stream.counts.launches;
    cx.stream.arena().begin_claims();
    let output = catch_panic(|| run(&mut Eager::new(cx)));
    let claims = cx.stream.arena().end_claims();
    let output = output?;
    cx.stream.check_joined(&format!("the end of {site}"))?;
    let mut freezer = Freezer::new(cx.stream);
    let frozen_output = output.freeze(&mut freezer)?;
    let outputs = freezer.tensors;
    scrub(cx.stream, &outputs, cx.live.rows())?;
    let is_own = outputs.iter().map(|output| cx.stream.arena().holds(&claims, output.ptr)).collect();
    let bridges = Bridges { tensors: outputs.clone(), is_own };
    let run = move |eager: &mut Eager<'_, L>, arena: &Arena| {
        come(eager, site)?;
        let output = replay(eager, &frozen, &Thaw { arena })?;
        check_joined_at_replay(eager, site)?;
        let mut carrier = Carrier::new(eager, &bridges);
        output.carry(&frozen_output, &mut carrier)?;
        carrier.finish()
    };
    let launches = cx.stream.counts.launches - launches_before;
    let step = Break { site, run: Box::new(run), claims, args, outputs, launches, not_healable: None };
    Ok((output, step, stamps))
}

/// Waits for all ranks before the body of a rank-coupled break.
fn come(stream: &OpStream, site: &BreakSite) -> Result<()> {
    match stream.ranks() {
        Some(ranks) if site.is_rank_coupled => ranks.come_all(RANK_COUPLED),
        _ => Ok(()),
    }
}

/// As [`OpStream::check_joined`], without making the place's name when all is well.
fn check_joined_at_replay(stream: &OpStream, site: &BreakSite) -> Result<()> {
    match stream.check_joined("") {
        Ok(()) => Ok(()),
        Err(_) => stream.check_joined(&format!("the end of {site}")),
    }
}
