use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

#[eager_on_graph]
fn attention(cx: &Eager<'_, ()>, q: &Tensor) -> Result<Tensor> {
    Ok(q.clone())
}

fn main() {}
