use bcg_runtime::{Freeze, Tensor};

#[derive(Freeze)]
enum Cache {
    Paged(Tensor),
    Empty,
}

fn main() {}
