//! Which kernels ran, from when to when, and when the host launched them: CUPTI's activity records, of kernels inside
//! graphs too.
//!
//! - The library is looked for once per process and never unloaded; its absence is an error, never a panic.
//! - Records are collected while one call of [`trace`] runs; traces take turns.
//! - Nothing is recorded, and nothing costs time, outside a trace.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::offset_of;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use libloading::Library;

use crate::compile::{library_candidates, open_library};
use crate::device::KernelTrace;
use crate::{Error, KernelRun, Result};

/// `CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL`: kernels, without keeping them from running side by side.
const KERNELS: c_int = 10;
/// `CUPTI_ACTIVITY_KIND_DRIVER` and `CUPTI_ACTIVITY_KIND_RUNTIME`: calls of the driver, and of libraries to the
/// runtime.
const CALLS: [c_int; 2] = [4, 5];
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

/// `CUpti_ActivityAPI`.
#[repr(C)]
struct CallRecord {
    kind: c_int,
    callback_id: u32,
    start_ns: u64,
    end_ns: u64,
    process_id: u32,
    thread_id: u32,
    correlation_id: u32,
    return_value: u32,
}

/// What the callbacks collect.
static COLLECTED: Mutex<Collected> = Mutex::new(Collected::new());

struct Collected {
    /// The kernels that ran, with the correlation of their launch.
    runs: Vec<(u32, KernelRun)>,
    /// The middle of each call, by its correlation, which counts up from call to call.
    calls: BTreeMap<u32, u64>,
    problem: Option<String>,
}

impl Collected {
    const fn new() -> Self {
        Self { runs: Vec::new(), calls: BTreeMap::new(), problem: None }
    }

    /// Returns the kernels in the order of their starts, or what went wrong.
    fn end(self) -> Result<Vec<KernelRun>> {
        if let Some(problem) = self.problem {
            return Err(Error::Trace(problem));
        }
        let calls = self.calls;
        let launched = |(correlation, run): (u32, KernelRun)| {
            // A library's call to the runtime may have one number and the driver's call within it the next one.
            let launch_ns = calls.range(..=correlation).next_back().map(|(_, &middle_ns)| middle_ns);
            KernelRun { launch_ns, ..run }
        };
        let mut runs: Vec<_> = self.runs.into_iter().map(launched).collect();
        runs.sort_by_key(|run| run.start_ns);
        Ok(runs)
    }
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
    timestamp: unsafe extern "C" fn(*mut u64) -> c_int,
    next_record: unsafe extern "C" fn(*mut u8, usize, *mut *mut c_void) -> c_int,
    // Keeps the functions above mapped; lives in a static, so it is never unloaded.
    _library: Library,
}

type BufferRequested = unsafe extern "C" fn(*mut *mut u8, *mut usize, *mut usize);
type BufferCompleted = unsafe extern "C" fn(*mut c_void, u32, *mut u8, usize, usize);

static CUPTI: OnceLock<std::result::Result<Cupti, String>> = OnceLock::new();

/// Runs `f`, which waits for its own work, and returns the kernels that ran meanwhile; `with_calls` also when each was
/// launched.
///
/// # Errors
/// [`Error::Trace`] without CUPTI, or if it fails; the first error of `f`.
pub(super) fn trace(with_calls: bool, f: impl FnOnce() -> Result<()>) -> Result<KernelTrace> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let cupti = CUPTI.get_or_init(Cupti::load).as_ref().map_err(|message| Error::Trace(message.clone()))?;
    cupti.flush()?;
    let clock = cupti.clock()?;
    *collected() = Collected::new();
    let kinds = if with_calls { &[KERNELS, CALLS[0], CALLS[1]][..] } else { &[KERNELS] };
    let result = kinds.iter().try_for_each(|&kind| cupti.enable(kind)).and_then(|()| f());
    let flushed = cupti.flush();
    let disabled = kinds.iter().map(|&kind| cupti.disable(kind)).fold(Ok(()), Result::and);
    result.and(flushed).and(disabled)?;
    let runs = std::mem::replace(&mut *collected(), Collected::new()).end()?;
    Ok(KernelTrace { runs, clock })
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
        // SAFETY: each type below is the signature that CUPTI's headers of CUDA 7 to 13 declare for the name beside it.
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
                timestamp: *library.get(c"cuptiGetTimestamp").map_err(|error| error.to_string())?,
                next_record: *library.get(c"cuptiActivityGetNextRecord").map_err(|error| error.to_string())?,
                _library: library,
            };
            (cupti, register(buffer_requested, buffer_completed))
        };
        if code == 0 { Ok(cupti) } else { Err(format!("cuptiActivityRegisterCallbacks failed with code {code}")) }
    }

    fn enable(&self, kind: c_int) -> Result<()> {
        // SAFETY: `enable` is bound in `Cupti::bind`; it takes a number and no pointer.
        check("cuptiActivityEnable", unsafe { (self.enable)(kind) })
    }

    fn disable(&self, kind: c_int) -> Result<()> {
        // SAFETY: as for `enable`.
        check("cuptiActivityDisable", unsafe { (self.disable)(kind) })
    }

    /// Reads the host's clock and CUPTI's at one moment: of some tries, the one that took the least time.
    fn clock(&self) -> Result<(Instant, u64)> {
        let mut best: Option<(Duration, Instant, u64)> = None;
        for _ in 0..16 {
            let (before, mut ns) = (Instant::now(), 0);
            // SAFETY: `timestamp` is bound in `Cupti::bind`; it writes one number to where it is told, which is `ns`.
            check("cuptiGetTimestamp", unsafe { (self.timestamp)(&raw mut ns) })?;
            let took = before.elapsed();
            if best.is_none_or(|(shortest, ..)| took < shortest) {
                best = Some((took, before + took / 2, ns));
            }
        }
        let (_, at, ns) = best.expect("tried more than once");
        Ok((at, ns))
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
    // SAFETY: every buffer that CUPTI has comes from `buffer_requested`, which leaked a box of this type and length,
    // and CUPTI hands it back once.
    let words: Box<[u64]> =
        unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(buffer.cast(), BUFFER_BYTES / size_of::<u64>())) };
    // No buffer is delivered before `get_or_init` returned: nothing is enabled earlier.
    if let Some(Ok(cupti)) = CUPTI.get() {
        let mut record = std::ptr::null_mut();
        // SAFETY: `buffer` holds `valid` bytes of records and lives until `words` drops below; `record` is null or the
        // record before, as the function asks for.
        while unsafe { (cupti.next_record)(buffer, valid, &raw mut record) } == 0 {
            // SAFETY: `record` points at a record in `buffer`, which begins with its kind, as every record does.
            let kind = unsafe { *record.cast::<c_int>() };
            if CALLS.contains(&kind) {
                // SAFETY: as above, aligned to 8 bytes; records of this kind are a `CallRecord`.
                let call: &CallRecord = unsafe { &*record.cast() };
                collected().calls.insert(call.correlation_id, call.start_ns.midpoint(call.end_ns));
                continue;
            }
            // SAFETY: as above; of the other kinds only kernels' records are enabled, and these begin with the fields
            // of `KernelRecord`.
            let run = unsafe { read(&*record.cast()) };
            match run {
                Ok(run) => collected().runs.extend(run),
                Err(problem) => collected().problem = Some(problem),
            }
        }
    }
    drop(words);
}

/// Copies a record, if it makes sense; `None` for a kernel that had not ended when the trace did.
///
/// # Safety
/// `record.name` is null or points at a NUL-terminated string.
unsafe fn read(record: &KernelRecord) -> std::result::Result<Option<(u32, KernelRun)>, String> {
    let KernelRecord {
        kind,
        start_ns,
        end_ns,
        name,
        correlation_id,
        device_context_stream: [device_id, _, stream_id],
        ..
    } = *record;
    if kind == KERNELS && (start_ns, end_ns) == (0, 0) {
        return Ok(None);
    }
    if kind != KERNELS || start_ns == 0 || end_ns < start_ns || name.is_null() {
        return Err(format!("CUPTI's record is none that this program knows: kind {kind}, {start_ns}..{end_ns} ns"));
    }
    // SAFETY: not null, so the caller says that it is a string.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    Ok(Some((correlation_id, KernelRun { name, start_ns, end_ns, stream_id, device_id, launch_ns: None })))
}
