use bcg_runtime::KernelArgs;

#[repr(C, align(16))]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    len: u32,
}

fn main() {}
