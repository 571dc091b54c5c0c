use bcg_runtime::KernelArgs;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args<T: Copy + Send + Sync + 'static> {
    len: T,
}

fn main() {}
