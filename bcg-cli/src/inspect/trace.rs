//! The timeline of a forward as a Chrome trace, which Perfetto and `chrome://tracing` show.

use std::collections::BTreeSet;

use bcg_runtime::{StepKind, StepTime};
use serde_json::{Value, json};

use super::memory::Memory;
use super::table::{self, BREAK_COLUMNS, Step};
use super::{Inspected, html, rounded};

/// The process of rank 0's lanes and of the host's one; the ranks after it have the processes after it. Streams have the
/// lanes after the host's, by their number.
const PROCESS: usize = 1;
const HOST: u32 = 1;

/// Makes the trace: names of the lanes, a complete event for each step and each kernel, and a counter of the arena's bytes.
pub(super) fn trace(inspected: &Inspected) -> Value {
    let title = format!("{}, {} on {}", inspected.model, inspected.description.name, inspected.device);
    let mut events = vec![name("process_name", 0, HOST, &title), name("thread_name", 0, HOST, "host")];
    events.extend(inspected.drawn_steps().iter().map(|step| step_event(inspected, step)));
    if let Ok(gpu) = &inspected.timeline.gpu {
        let streams: BTreeSet<(usize, u32)> =
            gpu.kernels.iter().map(|kernel| (kernel.rank, kernel.stream_id)).collect();
        events.extend((1..gpu.num_ranks()).map(|rank| name("process_name", rank, HOST, &format!("rank {rank}"))));
        for (rank, stream) in streams {
            events.push(name("thread_name", rank, lane(stream), &format!("GPU stream {stream}")));
        }
        events.extend(gpu.kernels.iter().map(|kernel| {
            let label = |kind: Option<StepKind>| kind.map(|kind| html::step_label(inspected, kind));
            let launched_by = kernel.step.and_then(|step| gpu.steps.get(step)).map(|step| step.kind);
            let mut args = json!({ "part": label(kernel.part), "launched_by": label(launched_by) });
            if let Some(wait_us) = kernel.wait_us {
                args["waited_us"] = rounded(wait_us).into();
            }
            let times = (kernel.begin_us, kernel.duration_us);
            complete(&kernel.name, "kernel", (kernel.rank, lane(kernel.stream_id)), times, &args)
        }));
    }
    events.extend(counter(inspected));
    json!({ "displayTimeUnit": "ns", "traceEvents": events })
}

fn lane(stream_id: u32) -> u32 {
    HOST + 1 + stream_id
}

fn name(what: &str, rank: usize, lane: u32, name: &str) -> Value {
    json!({ "ph": "M", "pid": PROCESS + rank, "tid": lane, "name": what, "args": { "name": name } })
}

fn complete(
    name: &str,
    category: &str,
    (rank, lane): (usize, u32),
    (begin_us, duration_us): (f64, f64),
    args: &Value,
) -> Value {
    json!({
        "ph": "X", "pid": PROCESS + rank, "tid": lane, "name": name, "cat": category,
        "ts": rounded(begin_us), "dur": rounded(duration_us), "args": args,
    })
}

fn step_event(inspected: &Inspected, step: &StepTime) -> Value {
    let (category, args) = match step.kind {
        StepKind::Segment(index) => {
            let kernels = inspected.description.segments.get(index).map(|segment| segment.kernels.clone());
            ("segment", json!({ "kernels": kernels }))
        }
        StepKind::Break(index) => {
            let one = inspected.description.breaks.get(index);
            let facts = one
                .into_iter()
                .flat_map(|one| BREAK_COLUMNS.iter().map(move |(key, _, read)| ((*key).to_owned(), read(one))));
            ("break", Value::Object(facts.collect()))
        }
        StepKind::Healed { .. } => ("healed", json!({})),
    };
    let times = (step.begin_us, step.duration_us);
    complete(&html::step_label(inspected, step.kind), category, (0, HOST), times, &args)
}

/// The bytes in use, at the times at which the host does what changes them.
fn counter(inspected: &Inspected) -> Vec<Value> {
    let spans = spans(inspected);
    let event = |&(place, bytes): &(f64, usize)| {
        let step = (place as usize).min(spans.len().checked_sub(1)?);
        let (begin_us, duration_us) = spans[step]?;
        let ts = begin_us + (place - step as f64) * duration_us;
        Some(json!({ "ph": "C", "pid": PROCESS, "name": "arena", "ts": rounded(ts), "args": { "bytes": bytes } }))
    };
    Memory::new(&inspected.description).usage.iter().filter_map(event).collect()
}

/// When the host did each step of the graph; those of a healed launch share its time evenly.
fn spans(inspected: &Inspected) -> Vec<Option<(f64, f64)>> {
    let steps = table::steps(&inspected.description);
    let segments = |step: &Step<'_>| match step {
        Step::Segment(index, _) => (*index, *index),
        Step::Break(_, one) => (one.after_segment, one.after_segment + 1),
    };
    let is_healed_in = |kind: StepKind, step: &Step<'_>| {
        let StepKind::Healed { first_segment, num_segments } = kind else { return false };
        let (first, last) = segments(step);
        first_segment <= first && last < first_segment + num_segments
    };
    let is_own = |kind: StepKind, step: &Step<'_>| match (kind, step) {
        (StepKind::Segment(at), Step::Segment(index, _)) | (StepKind::Break(at), Step::Break(index, _)) => at == *index,
        _ => false,
    };
    let drawn = inspected.drawn_steps();
    let span = |(at, step): (usize, &Step<'_>)| {
        if let Some(healed) = drawn.iter().find(|time| is_healed_in(time.kind, step)) {
            let first = steps.iter().position(|other| is_healed_in(healed.kind, other))?;
            let count = steps.iter().filter(|other| is_healed_in(healed.kind, other)).count();
            let share = healed.duration_us / count as f64;
            return Some((healed.begin_us + (at - first) as f64 * share, share));
        }
        drawn.iter().find(|time| is_own(time.kind, step)).map(|time| (time.begin_us, time.duration_us))
    };
    steps.iter().enumerate().map(span).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::inspected;
    use super::*;

    /// Checks each event against what the trace format asks of its phase, and returns the events.
    fn checked(trace: &Value) -> Vec<Value> {
        let events = trace["traceEvents"].as_array().expect("a list of events").clone();
        for event in &events {
            assert!(event["pid"].is_u64() && event["name"].is_string() && event["args"].is_object(), "{event}");
            let is_time = |key: &str| event[key].as_f64().is_some_and(|us| us >= 0.0 && us.is_finite());
            match event["ph"].as_str() {
                Some("M") => assert!(event["args"]["name"].is_string() && event["tid"].is_u64(), "{event}"),
                Some("X") => assert!(is_time("ts") && is_time("dur") && event["tid"].is_u64(), "{event}"),
                Some("C") => assert!(is_time("ts") && event["args"]["bytes"].is_u64(), "{event}"),
                _ => panic!("no phase that is written: {event}"),
            }
        }
        events
    }

    fn count(events: &[Value], phase: &str) -> usize {
        events.iter().filter(|event| event["ph"] == phase).count()
    }

    #[test]
    fn a_trace_names_its_lanes_and_has_every_step_every_kernel_and_the_bytes_in_use() {
        let events = checked(&trace(&inspected(true)));
        assert_eq!((count(&events, "M"), count(&events, "X"), count(&events, "C")), (3, 3 + 3, 6));
        let lanes: Vec<_> = events.iter().filter(|event| event["name"] == "thread_name").collect();
        assert_eq!((&lanes[0]["args"]["name"], &lanes[1]["args"]["name"]), (&"host".into(), &"GPU stream 7".into()));
        let attention = events.iter().find(|event| event["name"] == "attention").expect("the kernel");
        assert_eq!((&attention["tid"], &attention["ts"]), (&lanes[1]["tid"], &12.0.into()));
        assert_eq!(attention["args"]["launched_by"], "break 0: attend");
        // The break lasts from 5 to 11 µs and takes its block a third into its moments' span.
        let taken = events.iter().find(|event| event["args"]["bytes"] == 1280).expect("the break's block");
        assert_eq!(taken["ts"], 8.0);
    }

    #[test]
    fn a_trace_without_a_gpu_has_the_hosts_lane_alone() {
        let events = checked(&trace(&inspected(false)));
        assert_eq!((count(&events, "M"), count(&events, "X")), (2, 3));
    }

    #[test]
    fn the_steps_of_a_healed_launch_share_its_time() {
        let mut inspected = inspected(false);
        let time = |kind, begin_us, duration_us| StepTime { kind, begin_us, duration_us };
        inspected.timeline.steps = vec![
            time(StepKind::Break(0), 0.0, 2.0),
            time(StepKind::Healed { first_segment: 0, num_segments: 2 }, 3.0, 6.0),
        ];
        assert_eq!(spans(&inspected), [Some((3.0, 2.0)), Some((5.0, 2.0)), Some((7.0, 2.0))]);
        checked(&trace(&inspected));
    }
}
