use bcg_runtime::KernelArgs;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    x: &'static [f32],
    out: *mut f32,
}

fn main() {}
