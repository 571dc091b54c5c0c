use bcg_runtime::{OpStream, DType};

fn captured(stream: &mut OpStream) {
    stream.zeros(&[1], DType::F32);
    stream.alloc(4);
}

fn main() {}
