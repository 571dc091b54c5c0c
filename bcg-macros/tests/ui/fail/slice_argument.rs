use bcg_runtime::{Eager, Result, eager_on_graph};

#[eager_on_graph]
fn plan(cx: &mut Eager<'_, ()>, lengths: &[usize]) -> Result<()> {
    assert_eq!(lengths.len(), 1);
    Ok(())
}

fn main() {}
