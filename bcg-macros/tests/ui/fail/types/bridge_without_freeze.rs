use bcg_runtime::{Bridge, Tensor};

#[derive(Bridge)]
struct Routed {
    expert_inputs: Tensor,
}

fn main() {}
