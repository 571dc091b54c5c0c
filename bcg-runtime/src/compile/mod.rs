//! From CUDA source to cubin: disk cache first, NVRTC second. The lowest layer of the runtime: it imports no other.
//!
//! - Nothing is built when the crate is built: a cubin is made for the architecture of the device at hand.
//! - The same source, headers, options and compiler version give the same cache entry, whatever the process. A header
//!   that a source does not reach changes nothing.
//! - A machine without NVRTC gets an error that says what was looked for; a cached cubin needs NVRTC only for its version.
//!
//! Called by the CUDA device when a kernel is first used, and by CI for every kernel and architecture. Must never decide
//! *when* to compile, nor touch a GPU.

mod args;
mod cache;
mod library;
mod nvrtc;
mod source;

use std::ffi::CString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use nvrtc::{Nvrtc, nvrtc};
use source::Reached;

pub use args::{ArgField, ArgStruct, ArgType, ArgValue, KernelArgs};
pub(crate) use cache::{Cache, Key};
pub(crate) use library::{library_candidates, open_library};
pub use source::{Header, Source};

/// A GPU architecture, by its compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    /// The major number, such as 9 for Hopper.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
}

impl Arch {
    /// Names an architecture by its compute capability.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// Parses `sm_80`, `sm_90a`, `sm_100a`, or the bare number.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::Arch;
    /// assert_eq!(Arch::parse("sm_90a"), Some(Arch::new(9, 0)));
    /// assert_eq!(Arch::parse("sm_100a").unwrap().to_string(), "sm_100a");
    /// assert_eq!(Arch::parse("80").unwrap().to_string(), "sm_80");
    /// assert_eq!(Arch::parse("sm_x"), None);
    /// ```
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("sm_").unwrap_or(text);
        let number: u32 = digits.strip_suffix('a').unwrap_or(digits).parse().ok()?;
        (number >= 10).then_some(Self { major: number / 10, minor: number % 10 })
    }
}

impl fmt::Display for Arch {
    /// Writes the NVRTC name, with the `a` of the architecture-specific instructions from Hopper on.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.major >= 9 { "a" } else { "" };
        f.pad(&format!("sm_{}{}{suffix}", self.major, self.minor))
    }
}

/// Why a kernel could not be compiled.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// NVRTC is not on this machine.
    #[error("NVRTC not found: {message}; install CUDA 12.4 or newer, or name the library in BCG_NVRTC")]
    NoCompiler {
        /// What was looked for.
        message: String,
    },
    /// The source, or a header of it, includes a header in double quotes that the source does not list.
    #[error("{source_name}: there is no header \"{header}\", which {file} includes; name it in `with_headers`")]
    UnknownHeader {
        /// The source file's name.
        source_name: &'static str,
        /// The file with the `#include`: the source or a header.
        file: &'static str,
        /// The header's name.
        header: String,
    },
    /// NVRTC refused the source.
    #[error("{source_name} for {arch}: {log}")]
    Rejected {
        /// The source file's name.
        source_name: &'static str,
        /// The architecture compiled for.
        arch: Arch,
        /// The compiler's words.
        log: String,
    },
    /// NVRTC itself failed.
    #[error("{source_name} for {arch}: {message}")]
    Nvrtc {
        /// The source file's name.
        source_name: &'static str,
        /// The architecture compiled for.
        arch: Arch,
        /// The call and its status.
        message: String,
    },
}

/// Compiles `source` for `arch` to a cubin, or takes it from the cache on disk.
///
/// The cache is the folder `BCG_CACHE_DIR`, else `$XDG_CACHE_HOME/bcg`, else `~/.cache/bcg`. An entry is found by source,
/// the headers that the source reaches, options and compiler version. A cache that cannot be read or written costs a
/// warning and a compilation. So does a folder, or an entry, that belongs to another user than this process's or root, or
/// that others may write to: it is not used. A folder that is made gets mode 0700.
///
/// # Errors
/// [`CompileError::UnknownHeader`] for an `#include` of a header that the source does not list;
/// [`CompileError::NoCompiler`] without NVRTC; [`CompileError::Rejected`] with the compiler's log for a wrong source.
///
/// # Example
/// ```
/// use bcg_runtime::{Arch, CompileError, Source, compile};
///
/// let source = Source::new("nothing.cu", "extern \"C\" __global__ void nothing(unsigned) {}");
/// match compile(&source, Arch::new(9, 0)) {
///     Ok(cubin) => assert!(!cubin.is_empty()),
///     Err(CompileError::NoCompiler { message }) => println!("a machine without CUDA: {message}"),
///     Err(error) => panic!("{error}"),
/// }
/// ```
pub fn compile(source: &Source, arch: Arch) -> Result<Vec<u8>, CompileError> {
    let headers = source.reached()?;
    let nvrtc = nvrtc()?;
    let options = options(source, arch);
    let key = key(nvrtc.version(), source, &headers, &options);
    let cache = Cache::of_user();
    let name = source.name.trim_end_matches(".cu").replace('/', "-");
    let entry = format!("{name}-{arch}-{}.cubin", key.finish());
    if let Some(cubin) = cache.as_ref().and_then(|cache| cache.load(&entry)) {
        return Ok(cubin);
    }
    let cubin = compile_with(nvrtc, source, &headers, arch, &options)?;
    if let Some(cache) = cache {
        cache.store(&entry, &cubin);
    }
    Ok(cubin)
}

/// Compiles `source` for `arch` to a cubin, without any cache.
///
/// # Errors
/// Those of [`compile`].
pub fn compile_uncached(source: &Source, arch: Arch) -> Result<Vec<u8>, CompileError> {
    compile_with(nvrtc()?, source, &source.reached()?, arch, &options(source, arch))
}

/// Compiles many sources for `arch` in parallel, through the cache; the results are in the order of `sources`.
pub(crate) fn compile_all(sources: &[&Source], arch: Arch) -> Vec<Result<Vec<u8>, CompileError>> {
    parallel(sources, |source| compile(source, arch))
}

/// Applies `f` to every item on all processors and returns the results in order.
fn parallel<T: Sync, R: Send>(items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items.len()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { break };
                    let result = f(item);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// What a cubin depends on.
fn key(version: (i32, i32), source: &Source, headers: &[Reached], options: &[String]) -> Key {
    let mut key = Key::of(&[format!("nvrtc {}.{}", version.0, version.1).as_bytes()]);
    key.add(source.name.as_bytes());
    key.add(source.text.as_bytes());
    for (name, text) in headers {
        key.add(name.as_bytes());
        key.add(text.as_bytes());
    }
    options.iter().for_each(|option| key.add(option.as_bytes()));
    key
}

fn compile_with(
    nvrtc: &Nvrtc,
    source: &Source,
    headers: &[Reached],
    arch: Arch,
    options: &[String],
) -> Result<Vec<u8>, CompileError> {
    let source_name = source.name;
    let failed = |message: String| CompileError::Nvrtc { source_name, arch, message };
    let text = |value: &str| CString::new(value).map_err(|_| failed("holds a NUL byte".to_owned()));
    let headers =
        headers.iter().map(|(name, header)| Ok((text(name)?, text(header)?))).collect::<Result<Vec<_>, _>>()?;
    let options = options.iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
    let span = tracing::debug_span!("compile", source = source_name, %arch);
    let _entered = span.enter();
    nvrtc
        .compile(&text(source.name)?, &text(source.text)?, &headers, &options)
        .map_err(failed)?
        .map_err(|log| CompileError::Rejected { source_name, arch, log })
}

fn options(source: &Source, arch: Arch) -> Vec<String> {
    static INCLUDES: OnceLock<Vec<PathBuf>> = OnceLock::new();
    let mut options = vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()];
    let includes = INCLUDES.get_or_init(include_dirs);
    options.extend(includes.iter().map(|dir| format!("--include-path={}", dir.display())));
    options.extend(source.definitions());
    options
}

/// Returns the folders in which CUDA may be installed.
fn cuda_roots() -> Vec<PathBuf> {
    let named = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    named.chain([PathBuf::from("/usr/local/cuda")]).collect()
}

/// Returns the folders with CUDA's headers: `BCG_CUDA_INCLUDE`, CUDA's folders, and those beside the libraries.
///
/// The kernels of bcg need none of them; kernels of the runtime's users may.
fn include_dirs() -> Vec<PathBuf> {
    if let Some(dirs) = std::env::var_os("BCG_CUDA_INCLUDE") {
        return std::env::split_paths(&dirs).collect();
    }
    let mut dirs: Vec<PathBuf> = cuda_roots().iter().map(|root| root.join("include")).collect();
    if let Some(libraries) = std::env::var_os("LD_LIBRARY_PATH") {
        dirs.extend(std::env::split_paths(&libraries).filter_map(|dir| Some(dir.parent()?.join("include"))));
    }
    dirs.retain(|dir| has_cuda_headers(dir));
    dirs.dedup();
    dirs
}

fn has_cuda_headers(dir: &Path) -> bool {
    dir.join("cuda_fp16.h").is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_have_the_names_that_nvrtc_knows() {
        assert_eq!(Arch::new(8, 0).to_string(), "sm_80");
        assert_eq!(Arch::new(8, 9).to_string(), "sm_89");
        assert_eq!(Arch::new(9, 0).to_string(), "sm_90a");
        assert_eq!(Arch::new(10, 0).to_string(), "sm_100a");
    }

    #[test]
    fn a_machine_without_a_compiler_gets_an_error_that_names_it() {
        static WRONG: Source = Source::new("wrong.cu", "this is not CUDA");
        let error = compile_uncached(&WRONG, Arch::new(8, 0)).unwrap_err().to_string();
        assert!(error.contains("libnvrtc.so") || error.contains("wrong.cu"), "{error}");
    }

    #[test]
    fn every_part_of_a_key_counts() {
        let key = |version, name, text, options: &[&str]| {
            let options: Vec<String> = options.iter().map(ToString::to_string).collect();
            key(version, &Source::new(name, text), &[], &options).finish()
        };
        let keys = [
            key((13, 0), "a.cu", "text", &["x", "y"]),
            key((12, 9), "a.cu", "text", &["x", "y"]),
            key((13, 0), "b.cu", "text", &["x", "y"]),
            key((13, 0), "a.cu", "test", &["x", "y"]),
            key((13, 0), "a.cu", "text", &["xy"]),
            key((13, 0), "a.cu", "text", &["x", "z"]),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b), "{i}");
        }
    }

    #[test]
    fn a_key_covers_the_headers_that_its_source_reaches_and_no_other() {
        let key_of = |headers: &'static [&'static [Header]]| {
            let source = Source::new("a.cu", "#include \"near.cuh\"").with_headers(headers);
            key((13, 0), &source, &source.reached().unwrap(), &[]).finish()
        };
        const NEAR: Header = ("near.cuh", "#include \"far.cuh\"");
        let as_it_was = key_of(&[&[NEAR, ("far.cuh", "1"), ("other.cuh", "1")]]);
        assert_eq!(key_of(&[&[NEAR, ("far.cuh", "1"), ("other.cuh", "2")]]), as_it_was, "not reached");
        assert_ne!(key_of(&[&[NEAR, ("far.cuh", "2"), ("other.cuh", "1")]]), as_it_was, "reached by way of another");
        let touched = key_of(&[&[("near.cuh", "#include \"far.cuh\" // touched"), ("far.cuh", "1")]]);
        assert_ne!(touched, as_it_was, "reached");
    }

    #[test]
    fn a_key_covers_argument_structs_and_constants() {
        use crate::KernelArgs;

        #[repr(C)]
        #[derive(Clone, Copy, KernelArgs)]
        struct LenArgs {
            len: u32,
        }

        let key_of = |source: Source| {
            let options = options(&source, Arch::new(8, 0));
            key((13, 0), &source, &source.reached().unwrap(), &options).finish()
        };
        let source = Source::new("a.cu", "#include \"args.cuh\"");
        let keys = [source, source.takes::<LenArgs>(), source.define("N", 1), source.define("N", 2)].map(key_of);
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b), "{i}");
        }
    }

    #[test]
    fn parallel_work_keeps_its_order() {
        let items: Vec<usize> = (0..100).collect();
        assert_eq!(parallel(&items, |i| i * 2), items.iter().map(|i| i * 2).collect::<Vec<_>>());
    }
}
