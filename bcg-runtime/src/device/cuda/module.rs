//! Kernels: compiled, loaded, and found again at each launch without a lock.
//!
//! - Each source is compiled and loaded once per device; modules stay loaded as long as the backend.
//! - A kernel's function lies in the slot of its index: a launch reads one atomic.
//! - The first launch of a kernel takes the lock, and may compile. It is legal during a capture (the thread steps out of
//!   the capture's protection, and loading enqueues nothing on a capturing stream), but slow: prefer `Device::prepare`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CString;
use std::fmt::Display;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::CUfunction_attribute as Attribute;

use super::CudaBackend;
use super::sys::NOT_FOUND;
use crate::compile::{self, Source};
use crate::launch::{AnyKernel, KERNELS_MAX, Launch};
use crate::{Error, Result};

/// The loaded kernels of a device.
pub(super) struct Modules {
    /// By the kernel's index in this process.
    functions: Box<[OnceLock<Function>]>,
    /// Modules, by the address of their source.
    loaded: Mutex<HashMap<usize, u64>>,
}

/// A loaded kernel.
pub(super) struct Function {
    pub(super) raw: u64,
    /// Size of the kernel's only parameter; 0 if it has none.
    pub(super) arg_bytes: usize,
    /// Dynamic shared memory that a launch may ask for as things are.
    pub(super) shared_bytes: AtomicU32,
}

impl Modules {
    pub(super) fn new() -> Self {
        let functions = (0..KERNELS_MAX).map(|_| OnceLock::new()).collect();
        Self { functions, loaded: Mutex::default() }
    }

    /// Takes all modules out, to unload them.
    pub(super) fn take(&mut self) -> Vec<u64> {
        self.functions = Box::default();
        self.lock().drain().map(|(_, module)| module).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<usize, u64>> {
        // A module enters the map whole, so a panic elsewhere leaves nothing to repair.
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(source: &'static Source) -> usize {
    std::ptr::from_ref(source).addr()
}

fn kernel_error(kernel: &str, message: impl Display) -> Error {
    Error::Kernel { kernel: kernel.to_owned(), message: message.to_string() }
}

impl CudaBackend {
    /// Returns a kernel's function, which its first launch loads.
    pub(super) fn function(&self, kernel: &'static dyn AnyKernel) -> Result<&Function> {
        let index = kernel.index()?;
        match self.modules.functions.get(index).and_then(OnceLock::get) {
            Some(function) => Ok(function),
            None => self.load_kernel(kernel, index),
        }
    }

    #[cold]
    fn load_kernel(&self, kernel: &'static dyn AnyKernel, index: usize) -> Result<&Function> {
        let slot =
            self.modules.functions.get(index).ok_or_else(|| kernel_error(kernel.name(), "no room for its index"))?;
        let mut loaded = self.modules.lock();
        if let Some(function) = slot.get() {
            return Ok(function); // another thread was first
        }
        let source = kernel.source();
        let module = match loaded.get(&key(source)) {
            Some(module) => *module,
            None => {
                let module = self.load_source(kernel.name(), &self.compile(kernel.name(), source)?)?;
                loaded.insert(key(source), module);
                module
            }
        };
        let function = self.load_function(kernel, module)?;
        Ok(slot.get_or_init(|| function))
    }

    fn compile(&self, kernel: &str, source: &Source) -> Result<Vec<u8>> {
        compile::compile(source, self.arch).map_err(|error| kernel_error(kernel, error))
    }

    fn load_source(&self, kernel: &str, cubin: &[u8]) -> Result<u64> {
        if !is_whole_elf(cubin) {
            return Err(kernel_error(
                kernel,
                format!("its cubin of {} bytes is damaged; empty the kernel cache", cubin.len()),
            ));
        }
        let _relaxed = self.enter()?;
        // SAFETY: `is_whole_elf`, just above, refuses an image that was cut; its contents come from the compiler, or from
        // the cache of `compile`, which compares a checksum.
        unsafe { self.driver.load_module(cubin) }.map_err(|error| kernel_error(kernel, error))
    }

    fn load_function(&self, kernel: &'static dyn AnyKernel, module: u64) -> Result<Function> {
        let _relaxed = self.enter()?;
        let fail = |error: Error| match error {
            Error::Driver { code: NOT_FOUND, .. } => {
                let source = kernel.source().name;
                kernel_error(kernel.name(), format!("{source} has no `extern \"C\" __global__` function of this name"))
            }
            error => kernel_error(kernel.name(), error),
        };
        let name = CString::new(kernel.name()).map_err(|error| kernel_error(kernel.name(), error))?;
        let raw = self.driver.function(module, &name).map_err(fail)?;
        self.driver.load_function(raw).map_err(fail)?;
        if self.driver.param_bytes(raw, 1).is_some() {
            return Err(kernel_error(kernel.name(), "it has several parameters; a kernel takes one struct by value"));
        }
        let shared = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let shared_bytes = self.driver.function_attribute(raw, shared).map_err(fail)?;
        Ok(Function {
            raw,
            arg_bytes: self.driver.param_bytes(raw, 0).unwrap_or(0),
            shared_bytes: AtomicU32::new(u32::try_from(shared_bytes).unwrap_or(0)),
        })
    }

    /// Returns the function of a launch, whose argument struct has the size of the kernel's parameter and whose shared
    /// memory the function may have.
    pub(super) fn launchable(&self, launch: &Launch) -> Result<&Function> {
        let function = self.function(launch.kernel)?;
        let is_settled = launch.args.as_slice().len() == function.arg_bytes
            && launch.dims.shared_bytes <= function.shared_bytes.load(Ordering::Acquire);
        if !is_settled {
            self.settle_launch(function, launch)?;
        }
        Ok(function)
    }

    /// Refuses a launch whose argument struct has another size than the kernel's, and raises the function's bound of
    /// dynamic shared memory, once and as far as the device can, for one that needs more.
    #[cold]
    fn settle_launch(&self, function: &Function, launch: &Launch) -> Result<()> {
        let (name, given) = (launch.kernel.name(), launch.args.as_slice().len());
        if given != function.arg_bytes {
            let message = format!("its argument struct has {given} bytes in Rust and {} in CUDA", function.arg_bytes);
            return Err(kernel_error(name, message));
        }
        let most = self.allow_shared(function)?;
        let wanted = launch.dims.shared_bytes;
        if wanted > most {
            let message =
                format!("it asks for {wanted} bytes of dynamic shared memory; {} has {most} for it", self.name);
            return Err(kernel_error(name, message));
        }
        Ok(())
    }

    /// Raises a function's bound of dynamic shared memory as far as the device can, and returns it.
    fn allow_shared(&self, function: &Function) -> Result<u32> {
        let _relaxed = self.enter()?;
        let fixed = self.driver.function_attribute(function.raw, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let most = self.shared_bytes_max.saturating_sub(usize::try_from(fixed).unwrap_or(0));
        let most = u32::try_from(most).unwrap_or(u32::MAX >> 1);
        let shared = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        self.driver.set_function_attribute(function.raw, shared, most.cast_signed())?;
        function.shared_bytes.store(most, Ordering::Release);
        Ok(most)
    }

    /// Compiles the sources that are not loaded, in parallel, then loads all kernels and settles what a first launch would.
    pub(super) fn prepare_kernels(&self, kernels: &[&'static dyn AnyKernel]) -> Result<()> {
        let mut missing: Vec<&'static dyn AnyKernel> = Vec::new();
        {
            let loaded = self.modules.lock();
            for &kernel in kernels {
                let is_same = |other: &&'static dyn AnyKernel| key(other.source()) == key(kernel.source());
                if !loaded.contains_key(&key(kernel.source())) && !missing.iter().any(is_same) {
                    missing.push(kernel);
                }
            }
        }
        let sources: Vec<&Source> = missing.iter().map(|kernel| kernel.source()).collect();
        for (kernel, cubin) in missing.iter().zip(compile::compile_all(&sources, self.arch)) {
            let cubin = cubin.map_err(|error| kernel_error(kernel.name(), error))?;
            if let Entry::Vacant(vacant) = self.modules.lock().entry(key(kernel.source())) {
                vacant.insert(self.load_source(kernel.name(), &cubin)?);
            }
        }
        kernels.iter().try_for_each(|kernel| self.allow_shared(self.function(*kernel)?).map(|_| ()))
    }
}

/// Tells whether an ELF image of 64 bits holds both of its header tables. The compiler writes them last, so a shortened
/// image lacks one.
fn is_whole_elf(image: &[u8]) -> bool {
    let number = |at: usize, bytes: usize| {
        let field = image.get(at..at + bytes)?;
        Some(field.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    let holds_table = |start: usize, entry_bytes: usize, count: usize| {
        let bytes = number(entry_bytes, 2)? * number(count, 2)?;
        Some(number(start, 8)?.checked_add(bytes)? <= image.len() as u64)
    };
    image.starts_with(b"\x7fELF\x02\x01")
        && holds_table(32, 54, 56).unwrap_or(false) // program headers
        && holds_table(40, 58, 60).unwrap_or(false) // section headers
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF image with one section header and one program header, in a cubin's order.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 64 + 64 + 56];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (image[32], image[54], image[56]) = (64 + 64, 56, 1); // program headers: start, size, number
        (image[40], image[58], image[60]) = (64, 64, 1); // section headers: start, size, number
        image
    }

    #[test]
    fn a_truncated_cubin_is_refused() {
        assert!(is_whole_elf(&image()));
        for bytes in 0..image().len() {
            assert!(!is_whole_elf(&image()[..bytes]), "{bytes} bytes");
        }
        let mut absurd = image();
        absurd[40..48].fill(0xff);
        assert!(!is_whole_elf(&absurd));
    }
}
