use bcg_runtime::KernelArgs;

#[derive(Clone, Copy, KernelArgs)]
struct Args {
    len: u32,
}

fn main() {}
