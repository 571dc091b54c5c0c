use bcg_runtime::{DevicePtr, KernelArgs};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    x: DevicePtr,
}

fn main() {
    let _: DevicePtr = bytemuck::cast(0x1000u64);
    let _: Args = bytemuck::cast(0x1000u64);
    let _: DevicePtr = bytemuck::Zeroable::zeroed();
}
