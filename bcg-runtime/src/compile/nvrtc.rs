//! Raw binding of NVRTC, CUDA's runtime compiler.
//!
//! - The library is looked for once per process and never unloaded; its absence is an error, never a panic.
//! - A program is destroyed when its guard drops, on every path.
//!
//! Called by [`compile()`](super::compile()) only. cudarc's binding is not used: it panics when the library is missing, and its list
//! of names lacks `libnvrtc.so.13`, the only name in CUDA 13's Python wheels.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use super::CompileError;
use super::library::{library_candidates, open_library};

type Program = *mut c_void;
type SizeOf = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type CopyTo = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// The functions of NVRTC that the compiler uses.
pub(super) struct Nvrtc {
    version: (i32, i32),
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    cubin_size: SizeOf,
    cubin: CopyTo,
    log_size: SizeOf,
    log: CopyTo,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    // Keeps the functions above mapped; lives in a static, so it is never unloaded.
    _library: Library,
}

/// The outcome of a compilation: the cubin, or the compiler's log.
pub(super) type Compiled = Result<Vec<u8>, String>;

/// Returns the process's NVRTC, or why there is none.
pub(super) fn nvrtc() -> Result<&'static Nvrtc, CompileError> {
    static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
    NVRTC.get_or_init(Nvrtc::load).as_ref().map_err(|message| CompileError::NoCompiler { message: message.clone() })
}

impl Nvrtc {
    fn load() -> Result<Self, String> {
        let candidates = library_candidates("BCG_NVRTC", &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]);
        // SAFETY: the names are NVIDIA's NVRTC, or a path that the user named as NVRTC in BCG_NVRTC.
        let (library, path) = unsafe { open_library(&candidates) }?;
        Self::bind(library).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn bind(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: each type below is the signature that nvrtc.h of CUDA 11.1 to 13 declares for the name beside it.
        // The copied function pointers stay valid because `_library` lives as long as they do.
        unsafe {
            let version_of = *library.get::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(c"nvrtcVersion")?;
            let (mut major, mut minor) = (0, 0);
            version_of(&raw mut major, &raw mut minor);
            Ok(Self {
                version: (major, minor),
                create: *library.get(c"nvrtcCreateProgram")?,
                compile: *library.get(c"nvrtcCompileProgram")?,
                destroy: *library.get(c"nvrtcDestroyProgram")?,
                cubin_size: *library.get(c"nvrtcGetCUBINSize")?,
                cubin: *library.get(c"nvrtcGetCUBIN")?,
                log_size: *library.get(c"nvrtcGetProgramLogSize")?,
                log: *library.get(c"nvrtcGetProgramLog")?,
                error_string: *library.get(c"nvrtcGetErrorString")?,
                _library: library,
            })
        }
    }

    /// Returns the compiler's version, such as `(13, 0)`.
    pub(super) fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles `text` with the named `headers` to a cubin.
    pub(super) fn compile(
        &self,
        name: &CStr,
        text: &CStr,
        headers: &[(CString, CString)],
        options: &[CString],
    ) -> Result<Compiled, String> {
        let names: Vec<*const c_char> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let texts: Vec<*const c_char> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: every pointer is a NUL-terminated string or an array of them, borrowed from the parameters and the
        // three vectors above, which outlive `program`; the counts are those of the arrays.
        let status = unsafe {
            (self.create)(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                names.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", status)?;
        let program = Guard { nvrtc: self, program };
        // SAFETY: `program` was created above and not destroyed; `options` holds `len` NUL-terminated strings.
        let status = unsafe { (self.compile)(program.program, options.len() as c_int, options.as_ptr()) };
        if status != 0 {
            let mut log = program.text("nvrtcGetProgramLog", self.log_size, self.log).unwrap_or_default();
            log.retain(|byte| *byte != 0);
            return Ok(Err(format!("{}\n{}", self.error_name(status), String::from_utf8_lossy(&log).trim_end())));
        }
        program.text("nvrtcGetCUBIN", self.cubin_size, self.cubin).map(Ok)
    }

    fn error_name(&self, status: c_int) -> String {
        // SAFETY: NVRTC returns a static NUL-terminated string for every code, known or not.
        unsafe { CStr::from_ptr((self.error_string)(status)) }.to_string_lossy().into_owned()
    }

    fn check(&self, call: &str, status: c_int) -> Result<(), String> {
        if status == 0 { Ok(()) } else { Err(format!("{call}: {}", self.error_name(status))) }
    }
}

/// Destroys a program when dropped.
struct Guard<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Guard<'_> {
    fn text(&self, call: &str, size_of: SizeOf, copy_to: CopyTo) -> Result<Vec<u8>, String> {
        let mut size = 0;
        // SAFETY: the program is alive, since `self` destroys it only when dropped.
        self.nvrtc.check(call, unsafe { size_of(self.program, &raw mut size) })?;
        let mut bytes = vec![0u8; size];
        // SAFETY: as above, and `bytes` holds the `size` bytes that NVRTC asked for in the call before.
        self.nvrtc.check(call, unsafe { copy_to(self.program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created by `Nvrtc::compile`, and this is the only place that destroys it.
        unsafe { (self.nvrtc.destroy)(&raw mut self.program) };
    }
}
