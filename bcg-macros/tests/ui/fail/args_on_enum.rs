use bcg_runtime::KernelArgs;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
enum Args {
    Fill(u32),
    Copy(u64),
}

fn main() {}
