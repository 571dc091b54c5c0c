use bcg_runtime::{CaptureStream, Tensor};

fn captured(stream: &mut CaptureStream, x: &Tensor) {
    stream.upload::<f32>(x, &[1.0]);
}

fn main() {}
