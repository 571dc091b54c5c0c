//! Compiles every kernel for the architectures named on the command line, without cache and without a GPU.
//!
//! `cargo run -p bcg-kernels --example compile_all -- sm_80 sm_90a sm_100a`; exits with 1 if any kernel fails.

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use bcg_runtime::{Arch, Source, compile_uncached};

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let names = if names.is_empty() { ["sm_80", "sm_90a", "sm_100a"].map(String::from).to_vec() } else { names };
    let mut jobs: Vec<(&Source, Arch)> = Vec::new();
    for name in &names {
        let Some(arch) = Arch::parse(name) else {
            eprintln!("{name}: not an architecture; expected something like sm_90a");
            return ExitCode::FAILURE;
        };
        jobs.extend(bcg_kernels::sources().chain(bcg_runtime::SOURCES.iter().copied()).map(|source| (source, arch)));
    }
    let (start, total, failures) = (Instant::now(), jobs.len(), Mutex::new(0));
    let queue = Mutex::new(jobs.into_iter());
    let next = || queue.lock().expect("no thread panics while it holds the queue").next();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some((source, arch)) = next() {
                    if !compile_one(source, arch) {
                        *failures.lock().expect("no thread panics while it counts") += 1;
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("all threads have ended");
    println!("{} of {total} compiled in {:.1} s", total - failures, start.elapsed().as_secs_f64());
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn compile_one(source: &Source, arch: Arch) -> bool {
    let start = Instant::now();
    match compile_uncached(source, arch) {
        Ok(cubin) => {
            let ms = start.elapsed().as_millis();
            println!("ok    {arch:<8} {:<26} {:>7} bytes {ms:>6} ms", source.name, cubin.len());
            true
        }
        Err(error) => {
            println!("FAIL  {arch:<8} {error}");
            false
        }
    }
}
