use bcg_runtime::KernelArgs;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    len: usize,
    shifts: [isize; 2],
}

fn main() {}
