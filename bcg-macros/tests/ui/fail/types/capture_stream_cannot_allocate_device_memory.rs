use bcg_runtime::{CaptureStream, DType};

fn captured(stream: &mut CaptureStream) {
    stream.zeros(&[1], DType::F32);
    stream.alloc(4);
}

fn main() {}
