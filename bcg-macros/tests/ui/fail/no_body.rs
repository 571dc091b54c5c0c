use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

trait Mixer {
    #[eager_on_graph]
    fn mix(&self, cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor>;
}

fn main() {}
