use bcg_runtime::{Freeze};

#[derive(Freeze)]
union Scale {
    float: f32,
    bits: u32,
}

fn main() {}
