//! Runs tests of the host device under Miri, and others under valgrind.
//!
//! Miri interprets the program and sees undefined behaviour of any kind: aliasing, data races, uninitialised values. It
//! cannot call C, start processes or run inline assembly, and takes a second for what otherwise takes a millisecond. So it
//! runs the unit tests of the files that hold `unsafe` code, or give their memory to such code; not those that look for
//! CUDA's libraries, multiply matrices (`gemm` asks the processor what it can), or try many schedules. Valgrind runs
//! everything, at a twentieth of the speed, and sees reads and writes outside of allocations and uses of uninitialised
//! bytes only.
//!
//! Miri comes with nightly toolchains, and this project is built with a stable one, so `rustup run nightly` runs it.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::process::{cargo, command, run as run_process};

/// Schedules that each conformance rule is run under, in place of a hundred.
const SCHEDULES: &str = "2";

/// Cases of each property.
const CASES: &str = "8";

/// The tests of `bcg-runtime` that Miri runs, by the beginnings of their names.
const UNDER_MIRI: &[&str] = &[
    "arena::tests",
    "device::host::backing",
    "device::host::capture",
    "device::host::control",
    "device::host::graph",
    "device::host::memory",
    "device::host::stream",
    "launch::",
    "op::",
    "segment::",
    "shape::",
    "transfer::",
];

/// Of these, the ones that try many schedules or faults, and would take minutes.
const SLOW_UNDER_MIRI: &[&str] = &[
    "a_fault_in_any_call_is_reported_and_leaks_nothing",
    "a_fork_and_join_keeps_its_edges_in_the_graph",
    "every_byte_arrives_whatever_the_number_of_threads",
    "many_failures_are_bounded_and_leave_the_stream_usable",
    "parallel_leaves_are_joined_before_later_work_of_the_stream",
    "streams_without_events_run_in_every_order",
];

/// The tests that valgrind runs, as arguments of `cargo test`.
const UNDER_VALGRIND: &[&[&str]] = &[
    &["-p", "bcg-runtime", "--lib"],
    &["-p", "bcg-tests", "--test", "host", "--test", "faults", "--test", "no_alloc"],
];

/// Runs `cargo xtask miri`, or with `--valgrind` its substitute.
pub(crate) fn run(flags: &[String]) -> Result<()> {
    match flags.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => under_miri(),
        ["--valgrind"] => under_valgrind(),
        _ => bail!("unexpected argument `{}`; miri knows --valgrind", flags.join(" ")),
    }
}

fn under_miri() -> Result<()> {
    let nightly = || {
        let mut cargo = command("rustup");
        cargo.args(["run", "nightly", "cargo", "miri"]);
        cargo
    };
    if !is_there(nightly().arg("--version")) {
        bail!(
            "there is no Miri: `rustup toolchain install nightly --component miri,rust-src` installs it, and `cargo xtask miri \
             --valgrind` runs more tests, under valgrind, which sees less"
        );
    }
    let mut test = nightly();
    test.args(["test", "-p", "bcg-runtime", "--lib", "--"]).args(UNDER_MIRI);
    test.args(SLOW_UNDER_MIRI.iter().flat_map(|name| ["--skip", name]));
    // Files and clocks are the real ones.
    run_process(test.env("MIRIFLAGS", "-Zmiri-disable-isolation"))
}

fn under_valgrind() -> Result<()> {
    if !is_there(command("valgrind").arg("--version")) {
        bail!("there is no valgrind; install it from the system's packages");
    }
    for tests in UNDER_VALGRIND {
        let runner = r#"target."cfg(unix)".runner=["valgrind", "--quiet", "--error-exitcode=9"]"#;
        let mut test = cargo(["test", "--config", runner]);
        test.args(*tests).args(["--", "--test-threads=1"]);
        run_process(test.env("BCG_SCHEDULES", SCHEDULES).env("PROPTEST_CASES", CASES))?;
    }
    Ok(())
}

/// Tells whether a program can be started and succeeds, without a word.
fn is_there(command: &mut Command) -> bool {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}
