use bcg_runtime::{Eager, Result, eager_on_graph};

#[eager_on_graph(rank_coupled)]
fn all_to_all(cx: &mut Eager<'_, ()>) -> Result<()> {
    Ok(())
}

fn main() {}
