use bcg_runtime::KernelArgs;

#[derive(Clone, Copy)]
struct Shape(u32, u32);

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    shape: Shape,
}

fn main() {}
