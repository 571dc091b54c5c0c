use bcg_runtime::{Eager, Result, eager_on_graph};

struct Batch {
    num_sequences: usize,
}

impl bcg_runtime::LiveBatch for Batch {}

#[eager_on_graph]
fn num_sequences(cx: &mut Eager<'_, Batch>) -> Result<usize> {
    Ok(cx.live().num_sequences)
}

fn main() {}
