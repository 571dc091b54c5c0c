use bcg_runtime::{Eager, Result, eager_on_graph};

#[eager_on_graph(enable = "false")]
fn plan(cx: &mut Eager<'_, ()>) -> Result<()> {
    Ok(())
}

#[eager_on_graph(enable)]
fn without_value(cx: &mut Eager<'_, ()>) -> Result<()> {
    Ok(())
}

fn main() {}
