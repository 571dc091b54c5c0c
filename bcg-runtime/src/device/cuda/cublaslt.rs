//! Raw binding of cuBLASLt, CUDA's library of matrix products.
//!
//! - The library is looked for once per process and never unloaded; its absence is an error that says what was looked
//!   for.
//! - A status is a `u32`, never a Rust enum: a newer library may return one that is unknown here.
//! - What the library allocates on the host is owned by a guard that destroys it.
//!
//! It works on column-major matrices. A row-major `[T, K]` is a column-major `[K, T]`, so `out = x weightᵀ` is, in its
//! words, `D = Aᵀ B` with `A` the weight, `B` the rows, and `D` the output as `[N, T]`.

use std::ffi::{CStr, c_char, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

use super::bindings::bindings;
use crate::compile::{library_candidates, open_library};
use crate::device::traits::{Matmul, MatmulShape};
use crate::{DType, Error, Result};

const COMPUTE_F32: u32 = 68;
const TYPE_F32: u32 = 0;
const TYPE_F16: u32 = 2;
const TYPE_BF16: u32 = 14;

const DESC_TRANS_A: u32 = 3;
const OP_T: u32 = 1;
const PREF_WORKSPACE_BYTES_MAX: u32 = 1;
const PREF_REDUCTION_SCHEME_MASK: u32 = 3;
const PREF_MIN_ALIGNMENTS: [u32; 4] = [5, 6, 7, 8];
/// Partial sums are kept in f32, in the workspace, and added in one fixed order. The other schemes round partial sums
/// to the output's dtype. Not splitting the sum is always allowed.
const REDUCTION_IN_COMPUTE_TYPE: u32 = 2;
const NOT_SUPPORTED: u32 = 15;

/// An algorithm as the library describes it: opaque, and valid for the same version of the library on such a device.
pub(super) type Algorithm = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heuristic {
    pub(super) algorithm: Algorithm,
    pub(super) workspace_bytes: usize,
    status: u32,
    waves: f32,
    reserved: [i32; 4],
}

// SAFETY: the signatures are those of cublasLt.h of CUDA 12 and 13.
bindings! {
    /// The library's entry points.
    pub(super) struct CublasLt;
    cublasLtGetVersion() -> usize;
    cublasLtGetStatusName(u32) -> *const c_char;
    cublasLtCreate(*mut u64) -> u32;
    cublasLtDestroy(u64) -> u32;
    cublasLtMatmulDescCreate(*mut u64, u32, u32) -> u32;
    cublasLtMatmulDescSetAttribute(u64, u32, *const c_void, usize) -> u32;
    cublasLtMatmulDescDestroy(u64) -> u32;
    cublasLtMatrixLayoutCreate(*mut u64, u32, u64, u64, i64) -> u32;
    cublasLtMatrixLayoutDestroy(u64) -> u32;
    cublasLtMatmulPreferenceCreate(*mut u64) -> u32;
    cublasLtMatmulPreferenceSetAttribute(u64, u32, *const c_void, usize) -> u32;
    cublasLtMatmulPreferenceDestroy(u64) -> u32;
    cublasLtMatmulAlgoGetHeuristic(u64, u64, u64, u64, u64, u64, u64, i32, *mut Heuristic, *mut i32) -> u32;
    cublasLtMatmulAlgoCheck(u64, u64, u64, u64, u64, u64, *const Algorithm, *mut Heuristic) -> u32;
    cublasLtMatmul(u64, u64, *const c_void, u64, u64, u64, u64, *const c_void, u64, u64, u64, u64, *const Algorithm, u64, usize, u64) -> u32;
}

/// Calls an entry point and checks its status. The caller writes the `unsafe` and its proof.
macro_rules! call {
    ($library:expr, $symbol:ident($($arg:expr),* $(,)?)) => {
        $library.check(stringify!($symbol), ($library.$symbol)($($arg),*))
    };
}

impl CublasLt {
    /// Returns the process's cuBLASLt.
    ///
    /// # Errors
    /// [`Error::Kernel`] if there is none, with what was looked for; the same error at each call.
    pub(super) fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Result<CublasLt, String>> = OnceLock::new();
        const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];
        let library = LIBRARY.get_or_init(|| Self::open(&library_candidates("BCG_CUBLASLT", &NAMES)));
        library.as_ref().map_err(|message| Error::Kernel { kernel: "matmul".to_owned(), message: message.clone() })
    }

    fn open(candidates: &[PathBuf]) -> Result<Self, String> {
        const REMEDY: &str = "install cuBLAS of CUDA 12.4 or newer, or name the library in BCG_CUBLASLT";
        // SAFETY: the names are NVIDIA's cuBLASLt, or a path that the user named as cuBLASLt in BCG_CUBLASLT.
        let opened = unsafe { open_library(candidates) };
        let (library, path) = opened.map_err(|message| format!("cuBLASLt not found: {message}; {REMEDY}"))?;
        Self::bind(library).map_err(|error| format!("{}: {error}; {REMEDY}", path.display()))
    }

    /// Returns the library's version, such as 130200.
    pub(super) fn version(&self) -> usize {
        // SAFETY: takes no arguments.
        unsafe { (self.cublasLtGetVersion)() }
    }

    fn check(&self, call: &'static str, status: u32) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(self.error(call, status)) }
    }

    #[cold]
    fn error(&self, call: &'static str, status: u32) -> Error {
        // SAFETY: any status is accepted; the names are static C strings.
        let name = unsafe { (self.cublasLtGetStatusName)(status) };
        let name = if name.is_null() {
            "a status without a name".to_owned()
        } else {
            // SAFETY: not null (line above), a static C string.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        };
        Error::driver(call, status.cast_signed(), name)
    }
}

/// The library's state for one context.
pub(super) struct Handle {
    pub(super) library: &'static CublasLt,
    raw: u64,
}

impl Handle {
    /// Makes the state of the context that is current; it must also be current when the state is dropped.
    pub(super) fn new(library: &'static CublasLt) -> Result<Self> {
        let mut raw = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(library, cublasLtCreate(&raw mut raw)) }?;
        Ok(Self { library, raw })
    }

    /// Returns up to `max` algorithms for a product, the most promising first.
    ///
    /// # Errors
    /// [`Error::Kernel`] if there is none.
    pub(super) fn heuristics(
        &self,
        product: &Descriptors,
        shape: &MatmulShape,
        workspace_bytes_max: usize,
        max: usize,
    ) -> Result<Vec<Heuristic>> {
        let preference = Owned::preference(self.library)?;
        preference.set(PREF_WORKSPACE_BYTES_MAX, &(workspace_bytes_max as u64))?;
        preference.set(PREF_REDUCTION_SCHEME_MASK, &REDUCTION_IN_COMPUTE_TYPE)?;
        for attribute in PREF_MIN_ALIGNMENTS {
            preference.set(attribute, &(shape.alignment as u32))?;
        }
        let mut found = vec![Heuristic::default(); max];
        let mut count = 0;
        let [desc, a, b, d] = product.raw();
        // SAFETY: live descriptors of this library; `found` is writable for `max` results and `count` for one number.
        let status = unsafe {
            (self.library.cublasLtMatmulAlgoGetHeuristic)(
                self.raw,
                desc,
                a,
                b,
                d,
                d,
                preference.raw,
                max as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        if status != NOT_SUPPORTED {
            self.library.check("cublasLtMatmulAlgoGetHeuristic", status)?;
        }
        found.truncate(usize::try_from(count).unwrap_or(0));
        found.retain(|heuristic| heuristic.status == 0 && heuristic.workspace_bytes <= workspace_bytes_max);
        if found.is_empty() {
            let message = format!(
                "cuBLASLt {} has no algorithm for {shape}; copy the matrices so that rows begin at multiples of 16 bytes",
                self.library.version()
            );
            return Err(Error::Kernel { kernel: "matmul".to_owned(), message });
        }
        Ok(found)
    }

    /// Tells what workspace an algorithm needs for a product.
    ///
    /// # Errors
    /// The library's, if the algorithm cannot compute it.
    pub(super) fn workspace_bytes(&self, product: &Descriptors, algorithm: &Algorithm) -> Result<usize> {
        let mut result = Heuristic::default();
        let [desc, a, b, d] = product.raw();
        // SAFETY: live descriptors; the algorithm is 64 readable bytes, which the library validates; the result is
        // writable.
        unsafe {
            call!(self.library, cublasLtMatmulAlgoCheck(self.raw, desc, a, b, d, d, algorithm, &raw mut result))
        }?;
        self.library.check("cublasLtMatmulAlgoCheck", result.status)?;
        Ok(result.workspace_bytes)
    }

    /// Enqueues a product.
    pub(super) fn matmul(&self, descriptors: &Descriptors, product: &Matmul, stream: u64) -> Result<()> {
        let (one, zero) = (1.0f32, 0.0f32);
        let [desc, a, b, d] = descriptors.raw();
        let Matmul { x, weight, out, workspace, ref plan, .. } = *product;
        // SAFETY: live descriptors made of `product.shape`, a live stream; the factors are in host memory and read
        // before the call returns (the default pointer mode). The addresses come from `OpStream::addr`, and `shape`
        // from their tensors (`OpStream::matmul`), or from scratch memory of that size (`tuning.rs`); the workspace has
        // the bytes of the plan, which the library compares with what the algorithm needs.
        unsafe {
            call!(
                self.library,
                cublasLtMatmul(
                    self.raw,
                    desc,
                    (&raw const one).cast(),
                    weight.0,
                    a,
                    x.0,
                    b,
                    (&raw const zero).cast(),
                    out.0,
                    d,
                    out.0,
                    d,
                    &raw const plan.algorithm,
                    workspace.0,
                    plan.workspace_bytes,
                    stream,
                )
            )
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: created by `new`, destroyed here only; its context is current, by the contract of `new`.
        let status = unsafe { (self.library.cublasLtDestroy)(self.raw) };
        if status != 0 {
            tracing::warn!(status, "cublasLtDestroy failed; going on");
        }
    }
}

/// What the library knows of one shape.
pub(super) struct Descriptors {
    desc: Owned,
    a: Owned,
    b: Owned,
    d: Owned,
}

impl Descriptors {
    pub(super) fn new(library: &'static CublasLt, shape: &MatmulShape) -> Result<Self> {
        let MatmulShape { rows, outputs, depth, x_stride, weight_stride, out_stride, dtype, out_dtype, .. } = *shape;
        Ok(Self {
            desc: Owned::product(library)?,
            a: Owned::matrix(library, dtype, depth, outputs, weight_stride)?,
            b: Owned::matrix(library, dtype, depth, rows, x_stride)?,
            d: Owned::matrix(library, out_dtype, outputs, rows, out_stride)?,
        })
    }

    fn raw(&self) -> [u64; 4] {
        [&self.desc, &self.a, &self.b, &self.d].map(|owned| owned.raw)
    }
}

/// An object on the library's heap.
struct Owned {
    library: &'static CublasLt,
    raw: u64,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Product,
    Matrix,
    Preference,
}

impl Owned {
    /// `D = Aᵀ B` in f32: no TF32, sums in f32 whatever the operands.
    fn product(library: &'static CublasLt) -> Result<Self> {
        let mut raw = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(library, cublasLtMatmulDescCreate(&raw mut raw, COMPUTE_F32, TYPE_F32)) }?;
        let product = Self { library, raw, kind: Kind::Product };
        let transposed = OP_T;
        // SAFETY: a live descriptor; the value is readable for its size.
        unsafe {
            call!(
                library,
                cublasLtMatmulDescSetAttribute(raw, DESC_TRANS_A, (&raw const transposed).cast(), size_of::<u32>())
            )
        }?;
        Ok(product)
    }

    /// A column-major matrix.
    fn matrix(library: &'static CublasLt, dtype: DType, rows: usize, columns: usize, stride: usize) -> Result<Self> {
        let kind = match dtype {
            DType::Bf16 => TYPE_BF16,
            DType::F16 => TYPE_F16,
            DType::F32 => TYPE_F32,
            other => return Err(Error::shape("matmul", "bf16, f16 or f32", other)),
        };
        let mut raw = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe {
            call!(library, cublasLtMatrixLayoutCreate(&raw mut raw, kind, rows as u64, columns as u64, stride as i64))
        }?;
        Ok(Self { library, raw, kind: Kind::Matrix })
    }

    fn preference(library: &'static CublasLt) -> Result<Self> {
        let mut raw = 0;
        // SAFETY: the out-pointer is writable for the call.
        unsafe { call!(library, cublasLtMatmulPreferenceCreate(&raw mut raw)) }?;
        Ok(Self { library, raw, kind: Kind::Preference })
    }

    /// Sets an attribute of a preference.
    fn set<T: bytemuck::NoUninit>(&self, attribute: u32, value: &T) -> Result<()> {
        let value = bytemuck::bytes_of(value);
        // SAFETY: a live preference (all callers made it by `preference`); the value is readable for its size.
        unsafe {
            call!(
                self.library,
                cublasLtMatmulPreferenceSetAttribute(self.raw, attribute, value.as_ptr().cast(), value.len())
            )
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let destroy = match self.kind {
            Kind::Product => self.library.cublasLtMatmulDescDestroy,
            Kind::Matrix => self.library.cublasLtMatrixLayoutDestroy,
            Kind::Preference => self.library.cublasLtMatmulPreferenceDestroy,
        };
        // SAFETY: `raw` was created as this kind and is destroyed here only. A failure leaves a few bytes of host
        // memory.
        unsafe { destroy(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_the_library_gets_an_error_that_says_what_to_do() {
        let missing = ["libcublasLt-nowhere.so.13", "/nowhere/libcublasLt.so"].map(PathBuf::from);
        let Err(error) = CublasLt::open(&missing) else { panic!("no such library") };
        assert!(error.starts_with("cuBLASLt not found: looked for libcublasLt-nowhere.so.13, /nowhere/"), "{error}");
        assert!(error.contains("BCG_CUBLASLT"), "{error}");
    }

    #[test]
    fn a_library_that_is_not_cublaslt_is_an_error_that_names_the_symbol() {
        let Err(error) = CublasLt::open(&[PathBuf::from("libc.so.6")]) else { panic!("libc multiplies no matrices") };
        assert!(error.contains("cublasLtGetVersion") && error.contains("libc.so.6"), "{error}");
    }

    #[test]
    fn a_heuristic_has_the_size_that_the_library_writes() {
        assert_eq!((size_of::<Heuristic>(), std::mem::offset_of!(Heuristic, workspace_bytes)), (96, 64));
    }
}
