use bcg_runtime::{Eager, Result, eager_on_graph};

#[eager_on_graph]
fn plan(cx: &mut Eager<'_, ()>, _: ...) -> Result<()> {
    Ok(())
}

fn main() {}
