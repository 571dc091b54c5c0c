//! The commands that CI and people use: `cargo xtask <command>`.
//!
//! Each command lives in one file, prints what it runs, and ends with an error that names the remedy.

#![forbid(unsafe_code)]

mod bundle;
mod clients;
mod figures;
mod first_token;
mod fmt;
mod fuzz;
mod imports;
mod kernels;
mod layers;
mod licenses;
mod miri;
mod package;
mod page;
mod plots;
mod process;
mod soak;
mod tidy;
mod venv;

use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
cargo xtask <command>

  tidy            check names, lengths, leftovers, links, layers, and that every rule names its test
  fmt             format everything [--check only tells what is not formatted]
  licenses        check the licence of every dependency
  kernels         compile every kernel for sm_80, sm_90a and sm_100a with NVRTC from its Python wheel; needs no GPU
  test-clients    run others' clients and a gateway against the server [--sglang: SGLang's benchmark client, 350 MB]
  soak            let random requests, faults and overload loose on the server [--requests N] [--seed S]
  first-token     measure the time from the server's start to its first token; an error above 2 s
  fuzz            send spoiled inputs to everything that reads some, each target for a while
                  [http | chat | safetensors | config] [--seconds 600] [--seed N]
  miri            run the tests of the host device under Miri, which needs a nightly toolchain
                  [--valgrind runs more of them, under valgrind, which sees less]
  test-page       open the page of `bcg inspect --html` in a headless browser and use it
  package         package every crate that can be published [--verify builds them too] [--allow-dirty]
  figures FILE    print what moved from docs/figures.json to the standing.json of a run; an error if anything got slower
                  [--accept puts FILE in its place] [--quote, without FILE, writes its numbers into the documents]
  plots DIR       draw what `bcg bench … --json` wrote into DIR: docs/plots/*.svg
  gpu-bundle      put everything that a GPU machine must run into target/gpu-bundle
  test-gpu        make the bundle and run it on this machine's GPU; an error without one";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let command = args.next();
    let flags: Vec<String> = args.collect();
    if !matches!(
        command.as_deref(),
        Some("figures" | "fmt" | "fuzz" | "miri" | "package" | "plots" | "soak" | "test-clients")
    ) && let Some(flag) = flags.first()
    {
        bail!("unexpected argument `{flag}`\n\n{USAGE}");
    }
    match command.as_deref() {
        Some("tidy") => tidy::run(),
        Some("fmt") => fmt::run(&flags),
        Some("licenses") => licenses::run(),
        Some("kernels") => kernels::run(),
        Some("test-clients") => clients::run(&flags),
        Some("soak") => soak::run(&flags),
        Some("first-token") => first_token::run(),
        Some("fuzz") => fuzz::run(&flags),
        Some("miri") => miri::run(&flags),
        Some("figures") => figures::run(&flags),
        Some("test-page") => page::run(),
        Some("package") => package::run(&flags),
        Some("plots") => plots::run(&flags),
        Some("gpu-bundle") => bundle::run(),
        Some("test-gpu") => bundle::test(),
        Some("help" | "--help" | "-h") => {
            println!("{USAGE}");
            Ok(())
        }
        Some(other) => bail!("no command `{other}`\n\n{USAGE}"),
        None => bail!("a command is missing\n\n{USAGE}"),
    }
}
