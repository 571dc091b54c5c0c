use bcg_runtime::CaptureStream;

fn captured(stream: &mut CaptureStream) {
    stream.synchronize();
}

fn main() {}
