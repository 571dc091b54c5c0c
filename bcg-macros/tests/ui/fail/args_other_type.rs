use bcg_runtime::KernelArgs;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    limit: Option<u32>,
    pair: (u32, u32),
    call: fn(u32),
}

fn main() {}
