use bcg_runtime::{DevicePtr, KernelArgs};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    len: u32,
    x: DevicePtr,
}

fn main() {}
