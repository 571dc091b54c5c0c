//! A break calls a break, and itself, as plain functions.
#![deny(warnings)]

use bcg_runtime::{Context, Eager, Result, Tensor, eager_on_graph};

#[eager_on_graph]
fn inner(cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
    assert!(!cx.is_capturing());
    Ok(x.clone())
}

#[eager_on_graph]
fn outer(cx: &mut Eager<'_, ()>, x: &Tensor, depth: usize) -> Result<Tensor> {
    let x = inner(cx, x)?;
    if depth == 0 { Ok(x) } else { outer(cx, &x, depth - 1) }
}

fn main() {
    fn run(cx: &mut Context<'_, ()>, x: &Tensor) -> Result<Tensor> {
        outer(cx, x, 3)
    }
    let _ = run;
}
