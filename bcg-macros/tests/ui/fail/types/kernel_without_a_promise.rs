use bcg_runtime::{Kernel, KernelArgs, Source};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    len: u64,
}

static SOURCE: Source = Source::new("nothing.cu", "").takes::<Args>();
static KERNEL: Kernel<Args> = Kernel::new("nothing", &SOURCE, |_, _, _| Ok(()));

fn main() {}
