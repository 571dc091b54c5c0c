use bcg_runtime::{Kernel, KernelArgs, Source};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct OtherArgs {
    len: u64,
}

static SOURCE: Source = Source::new("nothing.cu", "").takes::<OtherArgs>();
// SAFETY: the source has no kernel, and the host reference does nothing.
static KERNEL: Kernel<Args> = unsafe { Kernel::new("nothing", &SOURCE, |_, _, _| Ok(())) };

fn main() {}
