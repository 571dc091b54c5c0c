use bcg_runtime::{DevicePtr, KernelArgs};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    x: DevicePtr,
    len: u32,
}

fn main() {}
