use bcg_runtime::OpStream;

fn captured(stream: &mut OpStream) {
    stream.synchronize();
}

fn main() {}
