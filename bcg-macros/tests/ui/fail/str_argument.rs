use bcg_runtime::{Eager, Result, eager_on_graph};

#[eager_on_graph]
fn plan(cx: &mut Eager<'_, ()>, name: &str) -> Result<()> {
    assert_eq!(name, "q_proj");
    Ok(())
}

fn main() {}
