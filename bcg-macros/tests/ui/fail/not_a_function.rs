use bcg_runtime::{eager_on_graph};

#[eager_on_graph]
struct Attention {
    num_heads: usize,
}

fn main() {}
