//! The attribute and the derives of `bcg-runtime`, which re-exports them: depend on that crate, not on this one.
//!
//! # In the order of the flow
//! `args` reads the options, `check` decides what can be a break and holds every message, `expand` writes the wrapper,
//! `freeze` derives the two traits of values that cross a break, `kernel_args` the argument structs of kernels.
//!
//! # What the attribute makes
//! ```text
//! #[eager_on_graph]
//! fn attention(cx: &mut Eager<'_, Batch>, q: &Tensor, scale: f32) -> Result<Tensor> { body }
//! ```
//! becomes a function for callers, with `Eager` replaced by `Context`:
//! ```text
//! fn attention(cx: &mut Context<'_, Batch>, q: &Tensor, scale: f32) -> Result<Tensor> {
//!     static SITE: BreakSite = …;                                      // name, file, line
//!     let body = |cx: &mut Eager<'_, Batch>, q: &Tensor, scale: f32| -> Result<Tensor> { body };
//!     eager_break(cx, &SITE,
//!         |freezer| Ok((Tensor::freeze(q, freezer)?, f32::freeze(&scale, freezer)?)),   // during a capture: what replay needs
//!         |eager| body(eager, q, scale),                                // now, with the real arguments
//!         move |eager, (q, scale), thaw| {                              // at each replay, with thawed arguments
//!             body(eager, &Tensor::thaw(q, thaw), f32::thaw(scale, thaw))
//!         })
//! }
//! ```
//! Outside a capture, and inside another break, this is a plain call. The body appears once; it captures nothing from
//! its surroundings, so a value reaches it as an argument (frozen at capture) or through `cx.live()` (of this run).
//!
//! # Rules
//! - The first parameter, after the receiver, is `cx: &mut Eager<'_, L>`, where `L: LiveBatch`.
//! - Other parameters are `T` or `&T` with `T: Freeze`, have plain names and borrow nothing else.
//! - The receiver, if any, is `self: &Arc<Self>`, or `&self` where `Self: Freeze`.
//! - The return type is `Result<R>` with `R: Bridge`, or an alias of it.
//! - Type and const generics, `where` clauses, generic impls and trait impls work as for any function. A trait declares
//!   the method as callers see it, with `Context`; the impl takes `Eager`.
//! - `async`, `const`, `unsafe`, `extern`, lifetime parameters and `impl Trait` arguments are refused.
//!
//! # What heals
//! A body that allocates, launches kernels, fills and copies on its own stream costs no launch of its own at a replay: its
//! work is patched into one executable with the segments around it. A body that reads back, waits, uploads from pageable
//! memory, calls `matmul`, opens a side stream or frees memory that it used works as well, and stays a break;
//! `BreakDescription::not_healable` says why. Memory that a body's work uses must not be freed by another thread while the
//! forward is being replayed.
//!
//! # Example
//! ```
//! use bcg_runtime::{Context, Device, Eager, LiveBatch, Result, Runner, RunnerOptions, Tensor, eager_on_graph};
//!
//! struct Batch { lengths: Vec<f32> }
//! impl LiveBatch for Batch {}
//!
//! /// Adds the lengths of the batch being run to `x`.
//! #[eager_on_graph]
//! fn add_lengths(cx: &mut Eager<'_, Batch>, x: &Tensor) -> Result<Tensor> {
//!     let lengths = &cx.live().lengths;
//!     let sums: Vec<f32> = cx.read::<f32>(x)?.iter().zip(lengths).map(|(x, length)| x + length).collect();
//!     let out = cx.empty(x.shape(), x.dtype())?;
//!     cx.upload(&out, &sums)?;
//!     Ok(out)
//! }
//!
//! let device = Device::host();
//! let mut runner = Runner::new(&device, RunnerOptions::default())?;
//! let x = device.tensor(&[2], &[1.0f32, 2.0])?;
//! let batch = Batch { lengths: vec![10.0, 20.0] };
//! let out = runner.eager(&batch, |cx: &mut Context<'_, Batch>| add_lengths(cx, &x))?;
//! assert_eq!(runner.read::<f32>(&out)?, [11.0, 22.0]);
//! # Ok::<(), bcg_runtime::Error>(())
//! ```
#![forbid(unsafe_code)]

mod args;
mod check;
mod expand;
mod freeze;
mod kernel_args;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Makes a function an eager break: called during a capture, it ends the open segment, runs eagerly, and runs again at
/// every replay, between the segments around it.
///
/// The body takes `&mut Eager<'_, L>`; callers pass `&mut Context<'_, L>`. Rules and expansion: see the crate's page.
///
/// # Options
/// Separated by commas, each at most once.
///
/// `enable = false` makes the function a plain call, captured like any other code, to compare with and without a break.
/// Its output need not be a `Bridge` then.
/// ```
/// use bcg_runtime::{DType, Eager, Result, Tensor, eager_on_graph};
///
/// #[eager_on_graph(enable = false)]
/// fn zeros(cx: &mut Eager<'_, ()>, rows: usize) -> Result<Tensor> {
///     let out = cx.empty(&[rows], DType::F32)?;
///     cx.fill_zero(&out)?;
///     Ok(out)
/// }
/// # let _ = zeros;
/// ```
///
/// `stub = path` calls another function, with the same parameters, in place of the body while a graph is captured;
/// eager calls and replays run the body. It must return outputs of the same shapes.
/// ```
/// use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};
///
/// #[eager_on_graph(stub = same_shape)]
/// fn exchange(cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
///     cx.synchronize()?; // stands for a wait that would be wasted on a capture's data
///     Ok(x.clone())
/// }
///
/// fn same_shape(cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
///     cx.empty(x.shape(), x.dtype())
/// }
/// # let _ = exchange;
/// ```
///
/// `rank_coupled` says that the body waits for other ranks, through something that is not the runner's own communicator,
/// such as another library. All ranks of the runner's world meet before the body, so none enters it alone, and it is never
/// part of a merged executable. While ranks capture nothing runs, so it requires a stub.
/// ```
/// use std::sync::Arc;
/// use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};
///
/// struct Experts;
///
/// impl Experts {
///     #[eager_on_graph(rank_coupled, stub = Self::keep_local)]
///     fn all_to_all(self: &Arc<Self>, cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
///         cx.synchronize()?; // stands for the exchange
///         Ok(x.clone())
///     }
///
///     fn keep_local(self: &Arc<Self>, _: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
///         Ok(x.clone())
///     }
/// }
/// # let _ = Experts::all_to_all;
/// ```
#[proc_macro_attribute]
pub fn eager_on_graph(options: TokenStream, item: TokenStream) -> TokenStream {
    expand::attribute(options.into(), item.into()).into()
}

/// Derives `Freeze` for a struct whose fields all implement it, so that it can be an argument of a break.
///
/// Bounds come from the fields, not from the type parameters; these must be `'static`. Enums, unions and structs that
/// borrow are refused.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use bcg_runtime::{Freeze, Tensor};
///
/// #[derive(Freeze)]
/// struct KvCache<T: Send + Sync> {
///     k: Tensor,
///     v: Tensor,
///     page_size: usize,
///     owner: Arc<T>,
/// }
///
/// fn takes_freeze<T: Freeze>() {}
/// takes_freeze::<KvCache<String>>();
/// ```
#[proc_macro_derive(Freeze)]
pub fn derive_freeze(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    freeze::freeze(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Derives `Bridge` for a struct whose fields all implement it, so that a break can return it. Derive `Freeze` with it.
///
/// # Example
/// ```
/// use bcg_runtime::{Bridge, Freeze, Live, Tensor};
///
/// #[derive(Freeze, Bridge)]
/// struct Routed {
///     expert_inputs: Tensor,
///     num_tokens: Live<usize>,
/// }
///
/// fn takes_bridge<T: Bridge>() {}
/// takes_bridge::<Routed>();
/// ```
#[proc_macro_derive(Bridge)]
pub fn derive_bridge(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    freeze::bridge(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Derives `KernelArgs` for a kernel's argument struct, which is then the only place that declares it: the CUDA source
/// includes the generated header `args.cuh`, with the same struct in C and a check of its size and of every offset.
///
/// The struct is `#[repr(C)]` and `Copy`, has named fields without padding between or after them, and is at most
/// `ARG_BYTES_MAX` bytes long. A field is a number (`u8` to `u64`, `i8` to `i64`, `f32`, `f64`), a `DevicePtr`, an array of
/// these, or another struct that derives `KernelArgs`. Names are the same on both sides.
///
/// A `DevicePtr` is a `void*` in CUDA. `#[points_to(const i32)]` makes it a `const int*`, and `#[points_to(bf16)]` a `bf16*`,
/// where `bf16` is a struct of the CUDA source.
///
/// # Example
/// ```
/// use bcg_runtime::{DevicePtr, KernelArgs, Source};
///
/// #[repr(C)]
/// #[derive(Clone, Copy, KernelArgs)]
/// struct ScaleArgs {
///     #[points_to(const f32)]
///     x: DevicePtr,
///     #[points_to(f32)]
///     out: DevicePtr,
///     len: u32,
///     factor: f32,
/// }
///
/// static SOURCE: Source = Source::new("scale.cu", r#"
/// #include "args.cuh"
/// extern "C" __global__ void scale(ScaleArgs a) {
///     unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
///     if (i < a.len) a.out[i] = a.x[i] * a.factor;
/// }"#).takes::<ScaleArgs>();
///
/// assert!(SOURCE.args_header().contains("const float* x;"));
/// ```
#[proc_macro_derive(KernelArgs, attributes(points_to))]
pub fn derive_kernel_args(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    kernel_args::kernel_args(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}
