//! Which kernels ran, from when to when: CUPTI's activity records, of kernels inside graphs too.
//!
//! - The library is looked for once per process and never unloaded; its absence is an error, never a panic.
//! - Records are collected while one call of [`trace`] runs; traces take turns.
//! - Nothing is recorded, and nothing costs time, outside a trace.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::offset_of;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use bcg_kernels::{library_candidates, open_library};
use libloading::Library;

use crate::{Error, KernelRun, Result};

/// `CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL`: kernels, without keeping them from running side by side.
const KERNELS: c_int = 10;
/// `CUPTI_ACTIVITY_FLAG_FLUSH_FORCED`: buffers that are not full are delivered too.
const FLUSH_FORCED: u32 = 1;
/// Records of about 5,000 kernels.
const BUFFER_BYTES: usize = 1 << 20;

/// The first fields of `CUpti_ActivityKernel3` to `CUpti_ActivityKernel10` (CUDA 7 to 13).
#[repr(C)]
struct KernelRecord {
    kind: c_int,
    cache_config: [u8; 2],
    registers_per_thread: u16,
    partitioned_cache: [u32; 2],
    start_ns: u64,
    end_ns: u64,
    completed_ns: u64,
    device_context_stream: [u32; 3],
    grid: [i32; 3],
    block: [i32; 3],
    shared_memory: [i32; 2],
    local_memory: [u32; 2],
    correlation_id: u32,
    grid_id: i64,
    name: *const c_char,
}

const _: () = assert!(offset_of!(KernelRecord, start_ns) == 16 && offset_of!(KernelRecord, name) == 104);

/// What the callbacks collect.
static COLLECTED: Mutex<Collected> = Mutex::new(Collected { runs: Vec::new(), problem: None });

struct Collected {
    runs: Vec<KernelRun>,
    problem: Option<String>,
}

fn collected() -> MutexGuard<'static, Collected> {
    // Every critical section is one push, take or replacement, so a panic elsewhere leaves nothing half done.
    COLLECTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The functions of CUPTI that a trace uses.
struct Cupti {
    enable: unsafe extern "C" fn(c_int) -> c_int,
    disable: unsafe extern "C" fn(c_int) -> c_int,
    flush_all: unsafe extern "C" fn(u32) -> c_int,
    next_record: unsafe extern "C" fn(*mut u8, usize, *mut *mut c_void) -> c_int,
    // Keeps the functions above mapped; lives in a static, so it is never unloaded.
    _library: Library,
}

type BufferRequested = unsafe extern "C" fn(*mut *mut u8, *mut usize, *mut usize);
type BufferCompleted = unsafe extern "C" fn(*mut c_void, u32, *mut u8, usize, usize);

static CUPTI: OnceLock<std::result::Result<Cupti, String>> = OnceLock::new();

/// Runs `f`, which waits for its own work, and returns the kernels that ran meanwhile, in the order of their starts.
///
/// # Errors
/// [`Error::Trace`] without CUPTI, or if it fails; the first error of `f`.
pub(super) fn trace(f: impl FnOnce() -> Result<()>) -> Result<Vec<KernelRun>> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let cupti = CUPTI.get_or_init(Cupti::load).as_ref().map_err(|message| Error::Trace(message.clone()))?;
    cupti.flush()?;
    *collected() = Collected { runs: Vec::new(), problem: None };
    // SAFETY: `enable` is bound in `Cupti::bind`; it takes a number and no pointer.
    check("cuptiActivityEnable", unsafe { (cupti.enable)(KERNELS) })?;
    let result = f();
    let flushed = cupti.flush();
    // SAFETY: as for `enable`.
    check("cuptiActivityDisable", unsafe { (cupti.disable)(KERNELS) })?;
    result.and(flushed)?;
    let Collected { mut runs, problem } =
        std::mem::replace(&mut *collected(), Collected { runs: Vec::new(), problem: None });
    if let Some(problem) = problem {
        return Err(Error::Trace(problem));
    }
    runs.sort_by_key(|run| run.start_ns);
    Ok(runs)
}

fn check(call: &str, code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::Trace(format!("{call} failed with code {code}"))) }
}

impl Cupti {
    fn load() -> std::result::Result<Self, String> {
        let candidates = library_candidates("BCG_CUPTI", &["libcupti.so.13", "libcupti.so.12", "libcupti.so"]);
        // SAFETY: the candidates are NVIDIA's CUPTI, or a path that the user named as CUPTI in BCG_CUPTI.
        let opened = unsafe { open_library(&candidates) };
        let (library, path) = opened.map_err(|why| format!("CUPTI comes with the CUDA toolkit; {why}"))?;
        Self::bind(library).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn bind(library: Library) -> std::result::Result<Self, String> {
        // SAFETY: each type below is the signature that cupti_activity.h of CUDA 7 to 13 declares for the name beside it.
        // The copied function pointers stay valid because `_library` lives as long as they do.
        let (cupti, code) = unsafe {
            let register = *library
                .get::<unsafe extern "C" fn(BufferRequested, BufferCompleted) -> c_int>(
                    c"cuptiActivityRegisterCallbacks",
                )
                .map_err(|error| error.to_string())?;
            let cupti = Self {
                enable: *library.get(c"cuptiActivityEnable").map_err(|error| error.to_string())?,
                disable: *library.get(c"cuptiActivityDisable").map_err(|error| error.to_string())?,
                flush_all: *library.get(c"cuptiActivityFlushAll").map_err(|error| error.to_string())?,
                next_record: *library.get(c"cuptiActivityGetNextRecord").map_err(|error| error.to_string())?,
                _library: library,
            };
            (cupti, register(buffer_requested, buffer_completed))
        };
        if code == 0 { Ok(cupti) } else { Err(format!("cuptiActivityRegisterCallbacks failed with code {code}")) }
    }

    /// Delivers the records so far to [`buffer_completed`]; returns when all are delivered.
    fn flush(&self) -> Result<()> {
        // SAFETY: `flush_all` is bound in `Cupti::bind`; it takes a number and no pointer.
        check("cuptiActivityFlushAll", unsafe { (self.flush_all)(FLUSH_FORCED) })
    }
}

/// Gives CUPTI an empty buffer, aligned to 8 bytes; it comes back in [`buffer_completed`].
unsafe extern "C" fn buffer_requested(buffer: *mut *mut u8, size: *mut usize, max_records: *mut usize) {
    let words = vec![0_u64; BUFFER_BYTES / size_of::<u64>()].into_boxed_slice();
    // SAFETY: CUPTI passes three valid out-pointers (cupti_activity.h, CUpti_BuffersCallbackRequestFunc).
    unsafe {
        *buffer = Box::into_raw(words).cast();
        *size = BUFFER_BYTES;
        *max_records = 0; // as many as fit
    }
}

/// Takes a buffer back and collects its records.
unsafe extern "C" fn buffer_completed(_: *mut c_void, _: u32, buffer: *mut u8, _: usize, valid: usize) {
    // SAFETY: every buffer that CUPTI has comes from `buffer_requested`, which leaked a box of this type and length, and
    // CUPTI hands it back once.
    let words: Box<[u64]> =
        unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(buffer.cast(), BUFFER_BYTES / size_of::<u64>())) };
    // No buffer is delivered before `get_or_init` returned: nothing is enabled earlier.
    if let Some(Ok(cupti)) = CUPTI.get() {
        let mut record = std::ptr::null_mut();
        // SAFETY: `buffer` holds `valid` bytes of records and lives until `words` drops below; `record` is null or the
        // record before, as the function asks for.
        while unsafe { (cupti.next_record)(buffer, valid, &raw mut record) } == 0 {
            // SAFETY: `record` points at a record in `buffer`, aligned to 8 bytes; only kernels' records are enabled, and
            // these begin with the fields of `KernelRecord`.
            let run = unsafe { read(&*record.cast()) };
            match run {
                Ok(run) => collected().runs.push(run),
                Err(problem) => collected().problem = Some(problem),
            }
        }
    }
    drop(words);
}

/// Copies a record, if it makes sense.
///
/// # Safety
/// `record.name` is null or points at a NUL-terminated string.
unsafe fn read(record: &KernelRecord) -> std::result::Result<KernelRun, String> {
    let KernelRecord { kind, start_ns, end_ns, name, .. } = *record;
    if kind != KERNELS || start_ns == 0 || end_ns < start_ns || name.is_null() {
        return Err(format!("CUPTI's record is none that this program knows: kind {kind}, {start_ns}..{end_ns} ns"));
    }
    // SAFETY: not null, so the caller says that it is a string.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    Ok(KernelRun { name, start_ns, end_ns })
}
