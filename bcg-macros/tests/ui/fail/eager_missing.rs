use bcg_runtime::{Result, eager_on_graph};

#[eager_on_graph]
fn plan() -> Result<()> {
    Ok(())
}

fn main() {}
