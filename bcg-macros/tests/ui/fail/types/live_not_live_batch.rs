use bcg_runtime::{Eager, Result, eager_on_graph};

struct Batch {
    num_sequences: usize,
}

#[eager_on_graph]
fn plan(cx: &mut Eager<'_, Batch>) -> Result<()> {
    Ok(())
}

fn main() {}
