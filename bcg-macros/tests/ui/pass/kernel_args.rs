//! Numbers, addresses, arrays, nested and public structs, in a crate without unsafe code.
#![forbid(unsafe_code)]
#![deny(warnings, missing_docs, missing_debug_implementations, unreachable_pub, unused_qualifications)]

use bcg_runtime::{DevicePtr, KernelArgs, Source};

/// Pages of a cache.
#[repr(C)]
#[derive(Clone, Copy, Debug, KernelArgs)]
pub struct Pages {
    /// Public.
    #[points_to(const bf16)]
    pub first: DevicePtr,
    stride: i64,
}

/// The arguments.
#[repr(C)]
#[derive(Clone, Copy, Debug, KernelArgs)]
pub struct Args {
    #[points_to(f32)]
    out: DevicePtr,
    #[points_to(const void)]
    peers: [DevicePtr; 4],
    anything: DevicePtr,
    pages: Pages,
    of_each: [Pages; 2],
    r#type: u32,
    factor: f32,
    bytes: [u8; 5],
    small: i8,
    short: i16,
    wide: f64,
}

static SOURCE: Source = Source::new("args.cu", "#include \"args.cuh\"").takes::<Args>();

fn main() {
    let header = SOURCE.args_header();
    for line in [
        "struct bf16;",
        "    const bf16* first;",
        "    float* out;",
        "    const void* peers[4];",
        "    void* anything;",
        "    Pages pages;",
        "    Pages of_each[2];",
        "    unsigned int type;",
        "    unsigned char bytes[5];",
        "static_assert(sizeof(Args) == 120, \"Args has another size in Rust\");",
        "static_assert(__INTADDR__(&((Args*)0)->wide) == 112, \"Args::wide lies elsewhere in Rust\");",
    ] {
        assert!(header.lines().any(|found| found == line), "{line}: not in\n{header}");
    }
}
