use bcg_runtime::{Eager, Result, eager_on_graph};

#[eager_on_graph(stub = "fake_plan")]
fn plan(cx: &mut Eager<'_, ()>) -> Result<()> {
    Ok(())
}

#[eager_on_graph(stub = |cx| Ok(()))]
fn with_closure(cx: &mut Eager<'_, ()>) -> Result<()> {
    Ok(())
}

fn main() {}
