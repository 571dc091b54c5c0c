use bcg_runtime::{DevicePtr, KernelArgs};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    x: DevicePtr,
    table: [u64; 32],
}

fn main() {}
