use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

struct View<'a> {
    tensor: &'a Tensor,
}

#[eager_on_graph]
fn by_value(cx: &mut Eager<'_, ()>, view: View<'_>) -> Result<Tensor> {
    Ok(view.tensor.clone())
}

#[eager_on_graph]
fn inside(cx: &mut Eager<'_, ()>, all: &Vec<&Tensor>) -> Result<Tensor> {
    Ok(all[0].clone())
}

fn main() {}
