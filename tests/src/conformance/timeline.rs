//! What is told of a forward: its steps in time, and its memory.

use std::collections::BTreeMap;

use bcg_runtime::{
    BlockLifetime, Context, Device, DeviceKind, GpuTimeline, ReplayMode, Result, Runner, StepKind, StepTime, Tensor,
    Timeline,
};

use super::fixture::{Batch, Graph, batch, bits, iota, options, scaled, step};

/// Three segments of one kernel and two breaks of one kernel.
fn forward(x: &Tensor) -> impl Fn(&mut Context<'_, Batch>) -> Result<Tensor> + Clone + Send + Sync + 'static {
    let x = x.clone();
    move |cx| {
        let a = step(cx, &x)?;
        let b = scaled(cx, &a)?;
        let c = step(cx, &b)?;
        drop((a, b));
        let d = scaled(cx, &c)?;
        step(cx, &d)
    }
}

/// Captures [`forward`] and takes a timeline of it; a replay after that gives what an eager run gives.
fn captured(device: &Device, replay: ReplayMode) -> (Graph, Timeline) {
    let x = iota(device, &[64, 16], 1.0);
    let mut options = options();
    options.replay = replay;
    let mut runner = Runner::new(device, options).expect("a runner");
    let mut graph = Graph::new("timeline");
    graph.capture(&mut runner, &batch(1.0), forward(&x)).expect("a capture");
    let timeline = graph.timeline(&mut runner, &batch(2.0)).expect("a timeline");
    let replayed = graph.replay(&mut runner, &batch(3.0)).expect("a replay");
    let replayed = bits(&mut runner, &replayed);
    let eager = runner.eager(&batch(3.0), forward(&x)).expect("an eager run");
    assert_eq!(replayed, bits(&mut runner, &eager));
    (graph, timeline)
}

/// Checks that the steps follow each other, and returns how often each segment was launched and each break run.
fn counted(steps: &[StepTime]) -> BTreeMap<(&'static str, usize), usize> {
    let mut counts = BTreeMap::new();
    for pair in steps.windows(2) {
        assert!(pair[0].end_us() <= pair[1].begin_us, "{pair:?}");
    }
    for step in steps {
        assert!(step.begin_us >= 0.0 && step.duration_us >= 0.0, "{step:?}");
        match step.kind {
            StepKind::Segment(index) => *counts.entry(("segment", index)).or_default() += 1,
            StepKind::Break(index) => *counts.entry(("break", index)).or_default() += 1,
            StepKind::Healed { first_segment, num_segments } => {
                for index in first_segment..first_segment + num_segments {
                    *counts.entry(("segment", index)).or_default() += 1;
                }
            }
        }
    }
    counts
}

/// Each segment and each break has one kernel: it ran once, after the step that launched it began.
fn check_kernels(gpu: &GpuTimeline) {
    let mut owners = BTreeMap::<(&str, usize), usize>::new();
    for kernel in &gpu.kernels {
        match kernel.part.expect("a kernel belongs to a segment or a break") {
            StepKind::Segment(index) => *owners.entry(("segment", index)).or_default() += 1,
            StepKind::Break(index) => *owners.entry(("break", index)).or_default() += 1,
            healed @ StepKind::Healed { .. } => panic!("{healed:?} is no part of a graph"),
        }
        let launched = &gpu.steps[kernel.step.expect("a step launched the kernel")];
        assert!(kernel.begin_us > launched.begin_us && kernel.duration_us > 0.0, "{kernel:?} {launched:?}");
    }
    assert_eq!(owners, counted(&gpu.steps));
    assert!(gpu.busy_us(0) <= gpu.span_us() + 1e-3, "{gpu:?}");
}

/// The timeline of a healed replay and of a chain has each segment and each break once, and on a GPU each kernel.
pub fn a_timeline_has_each_step_and_each_kernel_once(device: &Device) {
    for mode in [ReplayMode::Healed, ReplayMode::Chain] {
        let (_, timeline) = captured(device, mode);
        let parts = [("break", 0), ("break", 1), ("segment", 0), ("segment", 1), ("segment", 2)];
        assert_eq!(counted(&timeline.steps), parts.map(|part| (part, 1)).into());
        let is_healed = timeline.steps.iter().any(|step| matches!(step.kind, StepKind::Healed { .. }));
        assert_eq!(is_healed, mode == ReplayMode::Healed);
        let last = timeline.steps.last().expect("steps").end_us();
        assert!(last <= timeline.host_us && timeline.host_us <= timeline.wall_us, "{timeline:?}");
        match (device.kind(), &timeline.gpu) {
            (DeviceKind::Host, gpu) => assert!(gpu.is_err(), "{gpu:?}"),
            (DeviceKind::Cuda, gpu) => check_kernels(gpu.as_ref().expect("CUPTI, which comes with the CUDA toolkit")),
        }
    }
}

/// The blocks that a graph tells of lie within its extent, and two that are held at once lie apart.
pub fn blocks_that_are_held_at_once_lie_apart(device: &Device) {
    let (graph, _) = captured(device, ReplayMode::Healed);
    let description = graph.describe();
    let end = |block: &BlockLifetime| block.offset + block.bytes;
    assert_eq!(description.blocks.len(), 5, "one for each tensor");
    assert_eq!(description.blocks.iter().map(end).max(), Some(description.extent_bytes));
    for (index, a) in description.blocks.iter().enumerate() {
        assert!(a.from < a.to, "{a:?}");
        for b in &description.blocks[..index] {
            let in_time = a.from < b.to && b.from < a.to;
            let in_place = a.offset < end(b) && b.offset < end(a);
            assert!(!(in_time && in_place), "{a:?} and {b:?}");
        }
    }
    let steps: Vec<_> = description.blocks.iter().map(|block| (block.from.step, block.to.step)).collect();
    // The output is held to the end, one past the last of five steps.
    assert_eq!(steps, [(0, 2), (1, 2), (2, 4), (3, 4), (4, 5)]);
}
