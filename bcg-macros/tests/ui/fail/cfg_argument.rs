use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

#[eager_on_graph]
fn attention(cx: &mut Eager<'_, ()>, q: &Tensor, #[cfg(windows)] scale: f32) -> Result<Tensor> {
    Ok(q.clone())
}

fn main() {}
