use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

#[eager_on_graph]
fn attention<F: Fn(usize) -> usize>(cx: &mut Eager<'_, ()>, q: &Tensor, plan: &F) -> Result<Tensor> {
    q.rows(0..plan(1))
}

fn main() {}
