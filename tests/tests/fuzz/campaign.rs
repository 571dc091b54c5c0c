//! Tries inputs until the time is up.
//!
//! `BCG_FUZZ_SECONDS` and `BCG_FUZZ_SEED` set how long and which inputs; the same seed gives the same ones. The input at
//! work lies in `target/fuzz/<target>.txt`, where it is left if the process dies. An input that fails is made small first.

use std::cell::Cell;
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

/// How long a target runs under `cargo test`.
const SECONDS: u64 = 2;
/// Inputs of one seed.
const BATCH: u32 = 100;
/// Longer than any input takes; the process ends if one does not.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a failing input is made smaller.
const SHRINK_MS: u32 = 30_000;
/// The address space that all targets together may take: far more than they need, far less than absurd inputs ask for.
const ADDRESS_BYTES_MAX: usize = 6 << 30;

/// Tries inputs that `inputs` makes, and panics with the first for which `check` panics or returns an error; it tells
/// whether the input was taken, or refused as it may be.
pub(crate) fn run<S: Strategy>(target: &'static str, inputs: &S, check: impl Fn(&S::Value) -> Result<bool, String>) {
    let began = Instant::now();
    let time = Duration::from_secs(setting("BCG_FUZZ_SECONDS", SECONDS));
    let first_seed = setting("BCG_FUZZ_SEED", 0);
    let at_work = AtWork::new(target);
    let (mut num, num_taken) = (0, Cell::new(0));
    while began.elapsed() < time {
        let seed = first_seed + num / u64::from(BATCH);
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config {
            cases: BATCH,
            failure_persistence: None,
            max_shrink_time: SHRINK_MS,
            max_shrink_iters: u32::MAX,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let tried = runner.run(inputs, |input| {
            at_work.begin(seed, &input);
            let result = check(&input);
            at_work.end();
            let is_taken = result.and_then(|is_taken| check_memory().map(|()| is_taken));
            num_taken.set(num_taken.get() + u64::from(is_taken.map_err(TestCaseError::fail)?));
            Ok(())
        });
        if let Err(TestError::Fail(reason, input)) = &tried {
            at_work.begin(seed, input);
            panic!("{target}, BCG_FUZZ_SEED={seed}: {reason}\nthe smallest input that fails: {input:?}");
        }
        tried.unwrap_or_else(|error| panic!("{target}: {error}"));
        num += u64::from(BATCH);
    }
    at_work.remove();
    let (taken, seconds) = (num_taken.get(), began.elapsed().as_secs_f64());
    println!("{target}: {num} inputs in {seconds:.1} s, {taken} of them taken, seeds from {first_seed}");
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value}: a number")))
}

fn check_memory() -> Result<(), String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).ok_or("no VmPeak")?;
    let kib: usize = line.trim().trim_end_matches(" kB").parse().map_err(|error| format!("{line}: {error}"))?;
    if kib << 10 <= ADDRESS_BYTES_MAX { Ok(()) } else { Err(format!("the process took {kib} KiB of address space")) }
}

/// The input at work, kept in a file; a thread watches how long it takes.
struct AtWork {
    file: PathBuf,
    since: Arc<Mutex<Option<Instant>>>,
}

impl AtWork {
    fn new(target: &'static str) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("fuzz");
        fs::create_dir_all(&folder).expect("a writable target folder");
        let since = Arc::new(Mutex::new(None::<Instant>));
        let (file, watched) = (folder.join(format!("{target}.txt")), Arc::downgrade(&since));
        let name = file.display().to_string();
        std::thread::spawn(move || {
            while let Some(since) = watched.upgrade() {
                if since.lock().expect("a lock").is_some_and(|since| since.elapsed() > PATIENCE) {
                    eprintln!("{target}: no end after {} s, see {name}", PATIENCE.as_secs());
                    std::process::abort();
                }
                drop(since);
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Self { file, since }
    }

    fn begin(&self, seed: u64, input: &impl Debug) {
        fs::write(&self.file, format!("BCG_FUZZ_SEED={seed}\n{input:?}\n")).expect("a writable target folder");
        *self.since.lock().expect("a lock") = Some(Instant::now());
    }

    fn end(&self) {
        *self.since.lock().expect("a lock") = None;
    }

    fn remove(&self) {
        let _ = fs::remove_file(&self.file);
    }
}
