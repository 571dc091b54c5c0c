//! Compiles every kernel for every architecture, and tests what the compiler refuses, on a machine without a GPU.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::process::{self, cargo, command, output};
use crate::venv::{python, venv};

const ARCHS: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];

/// The compiler, and the headers that kernels may include.
const WHEELS: &str = "\
nvidia-cuda-nvrtc==13.0.*
nvidia-cuda-runtime==13.0.*
nvidia-cuda-crt==13.0.*
nvidia-cuda-cccl==13.0.*
";

/// Runs `cargo xtask kernels`.
pub(crate) fn run() -> Result<()> {
    let cuda = cuda_root(&venv("nvrtc", WHEELS)?)?;
    let libraries = cuda.join("lib");
    process::run(
        cargo(["run", "--quiet", "-p", "bcg-kernels", "--example", "compile_all", "--"])
            .args(ARCHS)
            .env("LD_LIBRARY_PATH", &libraries)
            .env("BCG_CUDA_INCLUDE", cuda.join("include")),
    )?;
    // The tests that compile; a named NVRTC must be there, so none of them does less without one.
    for (package, tests) in [("bcg-runtime", "compile::"), ("bcg-kernels", "fits_into_shared_memory")] {
        process::run(
            cargo(["test", "--quiet", "-p", package, "--lib", tests])
                .env("BCG_NVRTC", libraries.join("libnvrtc.so.13"))
                .env("LD_LIBRARY_PATH", &libraries),
        )?;
    }
    Ok(())
}

fn cuda_root(venv: &Path) -> Result<PathBuf> {
    let site = output(command(python(venv)).args(["-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]))?;
    let cuda = Path::new(site.trim()).join("nvidia").join("cu13");
    let found = cuda.join("lib").join("libnvrtc.so.13");
    found.exists().then_some(cuda).with_context(|| {
        format!("{} is missing: the wheels changed their layout; adapt xtask/src/kernels.rs", found.display())
    })
}
