use bcg_runtime::{Eager, Result, eager_on_graph};

#[eager_on_graph(enable = true, enable = false)]
fn plan(cx: &mut Eager<'_, ()>) -> Result<()> {
    Ok(())
}

fn main() {}
