use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

struct Attention {
    scale: Tensor,
}

impl Attention {
    #[eager_on_graph]
    fn scale(&self, cx: &mut Eager<'_, ()>) -> Result<&Tensor> {
        Ok(&self.scale)
    }
}

fn main() {}
