use bcg_runtime::{DevicePtr, KernelArgs};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    #[points_to(const f32*)]
    x: DevicePtr,
    #[points_to = "f32"]
    out: DevicePtr,
}

fn main() {}
