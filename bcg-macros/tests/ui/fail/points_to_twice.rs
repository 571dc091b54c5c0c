use bcg_runtime::{DevicePtr, KernelArgs};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    #[points_to(f32)]
    #[points_to(bf16)]
    x: DevicePtr,
}

fn main() {}
