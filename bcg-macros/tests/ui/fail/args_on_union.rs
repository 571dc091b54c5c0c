use bcg_runtime::KernelArgs;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
union Args {
    float: f32,
    bits: u32,
}

fn main() {}
