use bcg_runtime::{Eager, Result, eager_on_graph};

trait Planner {}

#[eager_on_graph]
fn plan(cx: &mut Eager<'_, ()>, planner: &impl Planner) -> Result<()> {
    Ok(())
}

fn main() {}
