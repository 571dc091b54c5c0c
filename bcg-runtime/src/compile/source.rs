//! CUDA sources, and the headers that each of them reaches.

use std::borrow::Cow;

use super::CompileError;
use super::args::{self, ArgStruct, KernelArgs};

/// The header that every source may include: dtypes, conversions, words of 16 bytes, block reductions.
const BUILT_IN: Header = ("bcg.cuh", include_str!("../../cuda/bcg.cuh"));

/// The name of the header that declares the argument structs of a source.
const ARGS: &str = "args.cuh";

/// The largest number of argument structs, and of constants, of one source.
const ENTRIES_MAX: usize = 16;

/// The name of a header, as sources include it, and its text.
pub type Header = (&'static str, &'static str);

/// As [`Header`], or generated.
pub(super) type Reached = (&'static str, Cow<'static, str>);

/// The text of one CUDA source file, and the headers that it may include.
///
/// `#include "bcg.cuh"` is always possible. Any other header in double quotes must be among those that
/// [`with_headers`](Self::with_headers) names; CUDA's own headers stand in angle brackets. `#include "args.cuh"` declares the
/// argument structs of the source's kernels, which [`takes`](Self::takes) lists.
///
/// # Example
/// ```
/// use bcg_runtime::Source;
///
/// const HEADERS: &[(&str, &str)] = &[("scale.cuh", "#include \"bcg.cuh\"\nconst f32 SCALE = 2.0f;")];
/// static SOURCE: Source = Source::new("scale.cu", "#include \"scale.cuh\"").with_headers(&[HEADERS]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The file's name, such as `scale.cu`, or its path, such as `norm/rms_norm/rms_norm.cu`; used in messages and in the
    /// cache.
    pub name: &'static str,
    /// The file's text.
    pub text: &'static str,
    headers: &'static [&'static [Header]],
    structs: [Option<&'static ArgStruct>; ENTRIES_MAX],
    constants: [Option<(&'static str, usize)>; ENTRIES_MAX],
}

impl Source {
    /// Names a CUDA source that includes no header but `bcg.cuh`.
    pub const fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, headers: &[], structs: [None; ENTRIES_MAX], constants: [None; ENTRIES_MAX] }
    }

    /// Names the lists of headers that the source, and the headers in them, may include, in place of those named before.
    ///
    /// What is listed but not included costs nothing: neither the compiler nor the cache sees it.
    #[must_use]
    pub const fn with_headers(self, headers: &'static [&'static [Header]]) -> Self {
        Self { headers, ..self }
    }

    /// Lists an argument struct of the source's kernels: `#include "args.cuh"` declares it, and those inside it.
    ///
    /// # Panics
    /// At compile time, at the 17th struct of a source.
    #[must_use]
    pub const fn takes<A: KernelArgs>(mut self) -> Self {
        let mut i = 0;
        while i < ENTRIES_MAX && self.structs[i].is_some() {
            i += 1;
        }
        assert!(i < ENTRIES_MAX, "the source takes too many argument structs: put some of its kernels into another");
        self.structs[i] = Some(A::STRUCT);
        self
    }

    /// Passes a constant that Rust and CUDA share: the source, and its headers, see `name` as a macro, a literal of 32 bits
    /// without sign, or of 64 bits where it does not fit.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::Source;
    ///
    /// const THREADS: usize = 128;
    /// static SOURCE: Source = Source::new("scale.cu", "__shared__ float sums[THREADS];").define("THREADS", THREADS);
    /// ```
    ///
    /// # Panics
    /// At compile time, at the 17th constant of a source.
    #[must_use]
    pub const fn define(mut self, name: &'static str, value: usize) -> Self {
        let mut i = 0;
        while i < ENTRIES_MAX && self.constants[i].is_some() {
            i += 1;
        }
        assert!(i < ENTRIES_MAX, "the source has too many constants: declare those of CUDA alone in its text");
        self.constants[i] = Some((name, value));
        self
    }

    /// Tells, at compile time, whether the source lists an argument struct.
    pub(crate) const fn lists(&self, wanted: &ArgStruct) -> bool {
        let mut i = 0;
        while i < ENTRIES_MAX {
            if let Some(listed) = self.structs[i]
                && listed.is(wanted)
            {
                return true;
            }
            i += 1;
        }
        false
    }

    /// Returns the text of `args.cuh`, as the compiler sees it.
    pub fn args_header(&self) -> String {
        args::header(self.structs.iter().copied().flatten())
    }

    /// Returns the compiler's options that define the constants.
    pub(super) fn definitions(&self) -> impl Iterator<Item = String> {
        let constants = self.constants.iter().flatten();
        constants.map(|(name, value)| {
            let suffix = if u32::try_from(*value).is_ok() { "u" } else { "ull" };
            format!("--define-macro={name}={value}{suffix}")
        })
    }

    /// Returns the headers that the source includes, itself or by way of other headers, each once.
    ///
    /// # Errors
    /// [`CompileError::UnknownHeader`] if one of them is not listed.
    pub fn reached(&self) -> Result<Vec<Reached>, CompileError> {
        let mut reached: Vec<Reached> = Vec::new();
        let mut unread: Vec<Header> = vec![(self.name, self.text)];
        while let Some((file, text)) = unread.pop() {
            for name in text.lines().filter_map(included) {
                if reached.iter().any(|header| header.0 == name) {
                    continue;
                }
                if name == ARGS {
                    reached.push((ARGS, Cow::Owned(self.args_header())));
                    continue;
                }
                let header = self.header(name).ok_or_else(|| CompileError::UnknownHeader {
                    source_name: self.name,
                    file,
                    header: name.to_owned(),
                })?;
                reached.push((header.0, Cow::Borrowed(header.1)));
                unread.push(header);
            }
        }
        Ok(reached)
    }

    fn header(&self, name: &str) -> Option<Header> {
        let listed = self.headers.iter().flat_map(|list| list.iter());
        [BUILT_IN].iter().chain(listed).find(|header| header.0 == name).copied()
    }
}

/// Returns the name in a line `#include "name"`.
fn included(line: &str) -> Option<&str> {
    let directive = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("include")?;
    directive.trim_start().strip_prefix('"')?.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_reaches_what_its_headers_include() -> Result<(), CompileError> {
        const TILES: &[Header] =
            &[("ring.cuh", "#include \"tile.cuh\""), ("tile.cuh", "  # include  \"bcg.cuh\" // f32")];
        const OWN: &[Header] = &[("own.cuh", "#include <cuda_fp16.h>\n#include \"ring.cuh\"\n#include \"tile.cuh\"")];
        let names = |text| -> Result<Vec<&str>, CompileError> {
            let source = Source::new("a.cu", text).with_headers(&[TILES, OWN]);
            Ok(source.reached()?.iter().map(|header| header.0).collect())
        };
        assert_eq!(names("// #include \"ring.cuh\"")?, [""; 0]);
        assert_eq!(names("#include \"bcg.cuh\"")?, ["bcg.cuh"]);
        assert_eq!(names("#include \"tile.cuh\"")?, ["tile.cuh", "bcg.cuh"]);
        assert_eq!(names("#include \"own.cuh\"")?, ["own.cuh", "ring.cuh", "tile.cuh", "bcg.cuh"]);
        Ok(())
    }

    #[test]
    fn a_header_that_is_not_listed_is_an_error_that_names_it_and_who_includes_it() {
        const HEADERS: &[Header] = &[("ring.cuh", "#include \"tiles.cuh\"")];
        let source = Source::new("a.cu", "#include \"ring.cuh\"").with_headers(&[HEADERS]);
        let error = source.reached().unwrap_err().to_string();
        assert_eq!(error, "a.cu: there is no header \"tiles.cuh\", which ring.cuh includes; name it in `with_headers`");
    }
}
