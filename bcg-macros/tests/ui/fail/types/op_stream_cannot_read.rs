use bcg_runtime::{OpStream, Tensor};

fn captured(stream: &mut OpStream, x: &Tensor) {
    stream.read::<f32>(x);
}

fn main() {}
