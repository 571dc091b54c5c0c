use bcg_runtime::KernelArgs;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    #[points_to(f32)]
    x: u64,
}

fn main() {}
