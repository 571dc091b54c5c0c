use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

struct Scratch(Vec<u8>);

#[eager_on_graph]
fn attention(cx: &mut Eager<'_, ()>, q: &Tensor, scratch: Option<Scratch>) -> Result<Tensor> {
    assert!(scratch.is_none());
    Ok(q.clone())
}

fn main() {}
