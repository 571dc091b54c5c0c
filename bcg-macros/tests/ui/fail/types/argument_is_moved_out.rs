use std::sync::Arc;

use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

struct Attention {
    scale: Tensor,
}

impl Attention {
    #[eager_on_graph]
    fn scale(self: &Arc<Self>, cx: &mut Eager<'_, ()>) -> Result<Tensor> {
        Ok(self.scale)
    }
}

#[eager_on_graph]
fn first(cx: &mut Eager<'_, ()>, all: &Vec<Tensor>) -> Result<Tensor> {
    let first: Tensor = all[0];
    Ok(first)
}

fn main() {}
