use bcg_runtime::{Freeze, Tensor};

struct Scratch(Vec<u8>);

#[derive(Freeze)]
struct Cache {
    k: Tensor,
    scratch: Scratch,
}

fn main() {}
