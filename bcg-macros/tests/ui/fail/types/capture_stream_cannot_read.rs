use bcg_runtime::{CaptureStream, Tensor};

fn captured(stream: &mut CaptureStream, x: &Tensor) {
    stream.read::<f32>(x);
}

fn main() {}
