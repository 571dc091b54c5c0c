use bcg_runtime::KernelArgs;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args(u32, f32);

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Nothing {}

fn main() {}
