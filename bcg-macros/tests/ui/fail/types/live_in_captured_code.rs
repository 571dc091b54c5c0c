use bcg_runtime::{BreakableCudaGraph, Context, Device, LiveBatch, Result, Runner, RunnerOptions};

struct Batch {
    num_sequences: usize,
}

impl LiveBatch for Batch {}

fn main() -> Result<()> {
    let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
    let mut graph = BreakableCudaGraph::new("live");
    graph.capture(&mut runner, &Batch { num_sequences: 1 }, |cx: &mut Context<'_, Batch>| {
        let num_sequences = cx.live().num_sequences;
        assert_eq!(num_sequences, 1);
        Ok(())
    })
}
