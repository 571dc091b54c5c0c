use bcg_runtime::{Bridge, Freeze, Tensor};

#[derive(Freeze, Bridge)]
struct View<'a> {
    tensor: &'a Tensor,
}

fn main() {}
