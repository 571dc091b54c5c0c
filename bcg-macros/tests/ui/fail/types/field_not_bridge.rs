use bcg_runtime::{Bridge, Freeze, Tensor};

#[derive(Freeze, Bridge)]
struct Routed {
    expert_inputs: Tensor,
    num_used: usize,
}

fn main() {}
