//! Products of the rows of few tokens with the matrices of their experts, bound by reading the matrices of the experts
//! that have rows; CUDA source: `few_rows.cu`.
//!
//! A row of the output depends on that row of `x` and the expert's matrix alone, and the order of its sums on the depth
//! alone: other rows, experts and numbers of tokens, up to [`TOKENS_MAX`], change no bit.
//!
//! Called by `grouped_linear` and `grouped_gate_up`, which check the shapes. Never picked on the host device.

use bcg_runtime::{Arch, Device, Dims, Kernel, OpStream, Result, Source};
use half::bf16;

use super::args::GroupedArgs;
use super::host::{host_gate_up, host_linear};
use crate::check::Check;

pub(super) static SOURCE: Source = source!("linear/grouped/few_rows.cu")
    .takes::<GroupedArgs>()
    .define("WARPS", WARPS)
    .define("GROUP", GROUP)
    .define("EXPERTS_MAX", EXPERTS_MAX)
    .define("STEP_BYTES", STEP_BYTES);

const CHECK: Check = Check::new("grouped_linear");

/// The most tokens that the kernels take.
const TOKENS_MAX: usize = 16;
/// The most experts: a thread of a block lists each.
const EXPERTS_MAX: usize = 32 * WARPS;
/// Warps of a block.
const WARPS: usize = 16;
/// Rows of the weight that a block takes at a time.
const GROUP: usize = 32;
/// Bytes of a row that a warp copies in a step.
const STEP_BYTES: usize = 64;
/// Shared memory that the kernels have beside the dynamic one: a number of each warp.
const FIXED_BYTES: usize = WARPS * size_of::<u32>();
/// Dynamic shared memory of a block, at most.
const SHARED_BYTES_MAX: usize = (227 << 10) - FIXED_BYTES;

/// Kernels and the geometry that their source is made for.
struct Variant {
    /// The most tokens.
    tokens_max: usize,
    /// Steps of a warp that are on the way.
    stages: usize,
    gate_up: Kernel<GroupedArgs>,
    linear: Kernel<GroupedArgs>,
}

impl Variant {
    const fn new(tokens_max: usize, stages: usize, gate_up: &'static str, linear: &'static str) -> Self {
        // SAFETY: `grouped_gate_up` and `grouped_linear` have checked the shapes when `launch` runs, and the source
        // indexes by these alone.
        let gate_up = unsafe { Kernel::new(gate_up, &SOURCE, host_gate_up::<bf16>) }.programmatic();
        // SAFETY: as above.
        let linear = unsafe { Kernel::new(linear, &SOURCE, host_linear::<bf16>) }.programmatic();
        Self { tokens_max, stages, gate_up, linear }
    }

    /// Shared memory of a block: the stages of all warps, the sums of all warps for two items, the list of experts.
    const fn shared_bytes(&self, tokens: usize, experts: usize, chosen: usize) -> usize {
        let copies = self.stages * WARPS * (GROUP + tokens) * STEP_BYTES;
        let sums = 2 * WARPS * tokens * (GROUP + 8) * size_of::<f32>();
        copies + sums + (2 * (experts + chosen) + 1) * size_of::<u16>() + tokens * chosen
    }
}

/// The fewer tokens there are, the more of the weight is on the way.
static VARIANTS: [Variant; 3] = [
    Variant::new(2, 6, "grouped_gate_up_few_rows_2", "grouped_linear_few_rows_2"),
    Variant::new(8, 4, "grouped_gate_up_few_rows_8", "grouped_linear_few_rows_8"),
    Variant::new(TOKENS_MAX, 3, "grouped_gate_up_few_rows_16", "grouped_linear_few_rows_16"),
];

/// Picks the variant for a number of tokens, with its shared memory; `None` for too many tokens, experts or choices.
fn variant(a: &GroupedArgs) -> Option<(&'static Variant, usize)> {
    let (experts, chosen) = (a.experts as usize, a.chosen as usize);
    let tokens = (a.places as usize).checked_div(chosen)?;
    let variant = VARIANTS.iter().find(|variant| variant.tokens_max >= tokens)?;
    let shared_bytes = variant.shared_bytes(tokens, experts, chosen);
    (tokens > 0 && experts <= EXPERTS_MAX && shared_bytes <= SHARED_BYTES_MAX).then_some((variant, shared_bytes))
}

/// Tells whether [`launch`] serves this product of bf16 on a device.
pub(super) fn applies(device: &Device, a: &GroupedArgs) -> bool {
    // The variants need 227 KiB of shared memory.
    let is_able = matches!(device.compute_capability(), Some(Arch { major: 9 | 10, .. }));
    is_able && a.depth > 0 && a.is_in_words() && variant(a).is_some()
}

/// Enqueues the product.
pub(super) fn launch(cx: &mut OpStream, is_gated: bool, args: GroupedArgs) -> Result<()> {
    let Some((variant, shared_bytes)) = variant(&args) else {
        return Err(CHECK.error(format!("at most {TOKENS_MAX} tokens"), format!("{} places", args.places)));
    };
    let kernel = if is_gated { &variant.gate_up } else { &variant.linear };
    let shared_bytes = CHECK.u32("shared memory", shared_bytes)?;
    // One block for each multiprocessor, whatever the plan.
    let dims = Dims { shared_bytes, ..Dims::linear(cx.device().num_multiprocessors(), 32 * WARPS as u32) };
    cx.launch(kernel, dims, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cubin;
    use bcg_runtime::{CompileError, DevicePtr, compile_uncached};

    /// What CUDA keeps for itself of each block's shared memory; the block may take 227 KiB besides.
    const RESERVED_BYTES: usize = 1 << 10;

    fn args(tokens: u32, chosen: u32, experts: u32) -> GroupedArgs {
        GroupedArgs {
            x: DevicePtr::NULL,
            weight: DevicePtr::NULL,
            out: DevicePtr::NULL,
            offsets: DevicePtr::NULL,
            rows: DevicePtr::NULL,
            x_stride: 8,
            experts,
            outputs: 8,
            depth: 8,
            chosen,
            places: tokens * chosen,
            weight_is_input: 0,
        }
    }

    #[test]
    fn every_variant_fits_into_shared_memory() {
        for variant in &VARIANTS {
            assert!(variant.shared_bytes(variant.tokens_max, EXPERTS_MAX, 1) <= SHARED_BYTES_MAX);
        }
        // `cargo xtask kernels` names an NVRTC, so that this part runs there whatever else is installed.
        for arch in [Arch::new(9, 0), Arch::new(10, 0)] {
            let cubin = match compile_uncached(&SOURCE, arch) {
                Err(CompileError::NoCompiler { .. }) if std::env::var_os("BCG_NVRTC").is_none() => return,
                compiled => compiled.expect("a cubin"),
            };
            for variant in &VARIANTS {
                let expected = variant.shared_bytes(variant.tokens_max, EXPERTS_MAX, 1);
                for name in [variant.gate_up.name(), variant.linear.name()] {
                    let needed = cubin::constant_u32(&cubin, &format!("{name}_bytes")).expect("a constant");
                    assert_eq!(needed as usize, expected, "{name} for {arch}");
                    let fixed = cubin::static_shared_bytes(&cubin, name);
                    assert_eq!(fixed, RESERVED_BYTES + FIXED_BYTES, "{name} for {arch}");
                }
            }
        }
    }

    #[test]
    fn the_experts_of_known_models_fit_into_shared_memory() {
        for (experts, chosen) in [(8, 2), (64, 6), (128, 8), (256, 8), (512, 10)] {
            for tokens in 1..=TOKENS_MAX as u32 {
                let (variant, _) = variant(&args(tokens, chosen, experts)).expect("a variant");
                assert!(variant.tokens_max >= tokens as usize);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_left_to_other_kernels() {
        assert!(variant(&args(17, 8, 128)).is_none());
        assert!(variant(&args(16, 8, 513)).is_none());
        assert!(variant(&args(16, 300, 500)).is_none());
        assert!(variant(&args(0, 8, 128)).is_none());
        assert!(!applies(&Device::host(), &args(1, 8, 128)));
    }
}
