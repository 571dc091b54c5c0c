//! The CUDA sources of the ops: how an op names its own, and the list of all.

use bcg_runtime::{Header, Source};

use crate::{activation, attention, choose, collective, latent, linear, moe, norm, rows, ssm};

/// Names a CUDA source by its path in `src`. It may include the headers that the ops share, and those of its own folder that
/// are named here.
macro_rules! source {
    ($path:literal $(, $header:literal)*) => {
        bcg_runtime::Source::new($path, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/", $path)))
            .with_headers(&[$crate::sources::HEADERS, &[$(($header, include_str!($header))),*]])
    };
}

/// Declares the ops of a group: the module of each, what is public of it, and its CUDA sources.
///
/// `cargo fmt` does not see modules that a macro declares; `cargo xtask fmt` does.
macro_rules! ops {
    ($($op:ident),* $(,)?) => {
        $(mod $op;)*
        $(pub use $op::*;)*

        /// The CUDA sources of the group, a list for each op.
        pub(crate) const SOURCES: &[&[&bcg_runtime::Source]] = &[$($op::SOURCES),*];
    };
}

/// The headers that several ops share.
pub(crate) const HEADERS: &[Header] = &[
    ("collective.cuh", include_str!("../include/collective.cuh")),
    ("collective_gather.cuh", include_str!("../include/collective_gather.cuh")),
    ("collective_reduce.cuh", include_str!("../include/collective_reduce.cuh")),
    ("few_rows.cuh", include_str!("../include/few_rows.cuh")),
    ("hopper.cuh", include_str!("../include/hopper.cuh")),
    ("latent_attention.cuh", include_str!("../include/latent_attention.cuh")),
    ("logits.cuh", include_str!("../include/logits.cuh")),
    ("mma.cuh", include_str!("../include/mma.cuh")),
    ("moe_combine.cuh", include_str!("../include/moe_combine.cuh")),
    ("moe_exchange.cuh", include_str!("../include/moe_exchange.cuh")),
    ("moe_permute.cuh", include_str!("../include/moe_permute.cuh")),
    ("paged_attention.cuh", include_str!("../include/paged_attention.cuh")),
    ("persistent_decode.cuh", include_str!("../include/persistent_decode.cuh")),
    ("prefill.cuh", include_str!("../include/prefill.cuh")),
    ("random.cuh", include_str!("../include/random.cuh")),
    ("rms_norm.cuh", include_str!("../include/rms_norm.cuh")),
    ("silu.cuh", include_str!("../include/silu.cuh")),
    ("ssm.cuh", include_str!("../include/ssm.cuh")),
];

/// Returns the CUDA sources of all ops.
pub fn sources() -> impl Iterator<Item = &'static Source> {
    let groups = [
        activation::SOURCES,
        attention::SOURCES,
        choose::SOURCES,
        collective::SOURCES,
        latent::SOURCES,
        linear::SOURCES,
        moe::SOURCES,
        norm::SOURCES,
        rows::SOURCES,
        ssm::SOURCES,
    ];
    groups.into_iter().flatten().copied().flatten().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The paths of the `.cu` files below a folder, as [`Source::name`] has them.
    fn sources_below(folder: &std::path::Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources_below(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "cu") {
                let name = path.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap();
                found.push(name.to_str().unwrap().to_owned());
            }
        }
    }

    #[test]
    fn every_source_file_is_listed_once() {
        let mut files = Vec::new();
        sources_below(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut files);
        files.sort();
        let mut listed: Vec<&str> = sources().map(|source| source.name).collect();
        listed.sort_unstable();
        assert_eq!(listed, files);
    }

    #[test]
    fn no_source_needs_a_header_that_is_not_embedded() {
        for source in sources() {
            if let Err(error) = source.reached() {
                panic!("{error}");
            }
        }
    }
}
