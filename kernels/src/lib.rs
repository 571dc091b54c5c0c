//! The CUDA sources of bcg's ops.
//!
//! Owns one `src/<op>.cu` per op and the headers they include; the runtime compiles them when they are first used.
//!
//! - A kernel takes one `#[repr(C)]` struct by value; its Rust twin stands in the op's file.
//! - Addresses are computed in 64 bits, sums in f32 and in one fixed order, so a result depends on nothing but its inputs.
//! - The sources need no CUDA header, only NVRTC.

use bcg_runtime::{Header, Source};

/// The headers that the sources may include beyond the runtime's.
const HEADERS: &[Header] = &[
    ("attention_decode.cuh", include_str!("../include/attention_decode.cuh")),
    ("few_rows.cuh", include_str!("../include/few_rows.cuh")),
    ("grouped_linear.cuh", include_str!("../include/grouped_linear.cuh")),
    ("hopper.cuh", include_str!("../include/hopper.cuh")),
    ("latent_attention.cuh", include_str!("../include/latent_attention.cuh")),
    ("logit_search.cuh", include_str!("../include/logit_search.cuh")),
    ("logits.cuh", include_str!("../include/logits.cuh")),
    ("mla_decode.cuh", include_str!("../include/mla_decode.cuh")),
    ("mla_prefill.cuh", include_str!("../include/mla_prefill.cuh")),
    ("mma.cuh", include_str!("../include/mma.cuh")),
    ("moe_permute.cuh", include_str!("../include/moe_permute.cuh")),
    ("paged_attention.cuh", include_str!("../include/paged_attention.cuh")),
    ("prefill.cuh", include_str!("../include/prefill.cuh")),
    ("random.cuh", include_str!("../include/random.cuh")),
    ("rms_norm.cuh", include_str!("../include/rms_norm.cuh")),
    ("silu.cuh", include_str!("../include/silu.cuh")),
    ("ssm.cuh", include_str!("../include/ssm.cuh")),
];

/// Declares one static per source file, and [`ALL`].
macro_rules! sources {
    ($($(#[$doc:meta])* $name:ident = $file:literal),* $(,)?) => {
        $($(#[$doc])* pub static $name: Source = Source::new($file, include_str!($file)).with_headers(&[HEADERS]);)*

        /// Every source of this crate.
        pub static ALL: &[&Source] = &[$(&$name),*];
    };
}

sources! {
    /// Residual add and RMS norm in one pass.
    ADD_RMS_NORM = "add_rms_norm.cu",
    /// Index of the largest logit.
    ARGMAX = "argmax.cu",
    /// Attention of one query per sequence over paged keys and values.
    ATTENTION_DECODE = "attention_decode.cu",
    /// The same on tensor cores, split over a persistent grid by a plan.
    ATTENTION_DECODE_TILED = "attention_decode_tiled.cu",
    /// Causal attention of new tokens over paged keys and values.
    ATTENTION_PREFILL = "attention_prefill.cu",
    /// The same for compute capability 9.0.
    ATTENTION_PREFILL_HOPPER = "attention_prefill_hopper.cu",
    /// Causal convolution of each channel with few weights.
    CAUSAL_CONV1D = "causal_conv1d.cu",
    /// Strided copy of rows.
    COPY_ROWS = "copy_rows.cu",
    /// One value everywhere.
    FILL = "fill.cu",
    /// Sets elements to seeded, nearly normal random numbers.
    FILL_RANDOM = "fill_random.cu",
    /// RMS norm of groups of columns behind a gate.
    GATED_RMS_NORM = "gated_rms_norm.cu",
    /// Rows by index.
    GATHER_ROWS = "gather_rows.cu",
    /// Products of rows with the matrix of the expert that each belongs to.
    GROUPED_LINEAR = "grouped_linear.cu",
    /// The same of few rows.
    GROUPED_LINEAR_FEW_ROWS = "grouped_linear_few_rows.cu",
    /// The same of many rows for compute capability 9.0.
    GROUPED_LINEAR_HOPPER = "grouped_linear_hopper.cu",
    /// One matrix product per head.
    HEAD_LINEAR = "head_linear.cu",
    /// Key-value write.
    KV_WRITE = "kv_write.cu",
    /// Matrix product of few rows with a transposed weight.
    LINEAR_FEW_ROWS = "linear_few_rows.cu",
    /// Bias of single logits.
    LOGIT_BIAS = "logit_bias.cu",
    /// Latent attention of one query per sequence.
    MLA_DECODE = "mla_decode.cu",
    /// The same on tensor cores, split over a persistent grid by a plan.
    MLA_DECODE_TILED = "mla_decode_tiled.cu",
    /// Norm of the latent, rotary embedding, cache write.
    MLA_KV_WRITE = "mla_kv_write.cu",
    /// Causal latent attention of new tokens.
    MLA_PREFILL = "mla_prefill.cu",
    /// The same on tensor cores, over decompressed keys and values.
    MLA_PREFILL_TILED = "mla_prefill_tiled.cu",
    /// Weighted sum of a token's experts.
    MOE_COMBINE = "moe_combine.cu",
    /// Choices of experts in the order of the experts.
    MOE_PERMUTE = "moe_permute.cu",
    /// Choice of experts.
    MOE_ROUTE = "moe_route.cu",
    /// Query and key norm, rotary embedding, key-value write.
    QK_NORM_ROPE_KV_WRITE = "qk_norm_rope_kv_write.cu",
    /// Squared ReLU.
    RELU2 = "relu2.cu",
    /// RMS norm.
    RMS_NORM = "rms_norm.cu",
    /// Random choice of a token.
    SAMPLE = "sample.cu",
    /// Gated activation.
    SILU_MUL = "silu_mul.cu",
    /// Mamba2's recurrence over the new tokens of each sequence.
    SSD_SCAN = "ssd_scan.cu",
    /// The same on tensor cores.
    SSD_SCAN_TILED = "ssd_scan_tiled.cu",
    /// One step of Mamba2's recurrence.
    SSM_UPDATE = "ssm_update.cu",
    /// Exclusion of tokens by bit masks.
    TOKEN_MASK = "token_mask.cu",
    /// Log probabilities of the chosen and the likeliest tokens.
    TOP_LOGPROBS = "top_logprobs.cu",
    /// Tokens that the step before chose, and the page table.
    UNPACK_INPUTS = "unpack_inputs.cu",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_file_is_listed_once() {
        let mut files: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".cu"))
            .collect();
        files.sort();
        let listed: Vec<&str> = ALL.iter().map(|source| source.name).collect();
        assert_eq!(listed, files);
    }

    #[test]
    fn no_source_needs_a_header_that_is_not_embedded() {
        for source in ALL {
            for line in source.text.lines().filter(|line| line.trim_start().starts_with("#include")) {
                let mut known = HEADERS.iter().map(|header| header.0).chain(["bcg.cuh"]);
                let known = known.any(|name| line.contains(&format!("\"{name}\"")));
                assert!(known, "{}: {line}", source.name);
            }
        }
    }
}
