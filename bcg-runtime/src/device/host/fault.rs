//! Faults of a host device: which calls of the driver fail, hang or take long, and which work writes a wrong bit.
//!
//! Owns the count of driver calls and the faults that were asked for. `control.rs` asks for them, `queue.rs` runs the
//! work whose results are spoiled. Nothing here waits or locks.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::time::Duration;

use super::regions::Memory;
use crate::error::context_lost_name;
use crate::{DevicePtr, Error, Result};

/// The environment variable with the faults of a host device that [`Device::host_from_env`] opens.
///
/// [`Device::host_from_env`]: crate::Device::host_from_env
pub(crate) const FAULT_VARIABLE: &str = "BCG_HOST_FAULT";
/// How long a call hangs that nobody releases.
pub(super) const HANG_MAX: Duration = Duration::from_secs(300);
/// The driver's result if a fault says that the device is lost and not how: that of a kernel that traps.
const LOST_CODE: i32 = 719;
/// How many names of calls are kept.
const LOG_MAX: usize = 1 << 16;
/// The name that stands for a call of any name.
const ANY: &str = "any";

/// What is wrong with a driver call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// It fails once.
    Fail,
    /// It waits until it is released, at most that long.
    Hang(Duration),
    /// It panics once.
    Panic,
    /// It fails with this code, and so does every call after it.
    Lose(i32),
    /// It takes that much longer, and so does every call of its name after it.
    Slow(Duration),
}

/// A fault of a driver call that did not happen yet, or goes on happening.
#[derive(Debug)]
struct CallFault {
    call: String,
    /// Calls of this name until it happens; 0 if every one is slow from now on.
    left: u64,
    trouble: Trouble,
}

/// A bit that will be flipped once.
#[derive(Debug)]
struct Flip {
    work: String,
    /// Runs of this work until it happens.
    left: u64,
    bit: u64,
}

/// What happens to a call.
#[derive(Debug, Default)]
pub(super) struct Fate {
    pub(super) slow_by: Duration,
    /// It hangs, at most that long.
    pub(super) hangs: Option<Duration>,
    pub(super) fails: bool,
    pub(super) panics: bool,
}

/// The calls so far and those that shall fail.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) num_calls: u64,
    pub(super) log: VecDeque<&'static str>,
    /// Numbers of calls that fail.
    pub(super) at: Vec<u64>,
    /// Name → how many of its next calls fail.
    pub(super) named: HashMap<String, u64>,
    calls: Vec<CallFault>,
    /// The code that every call fails with since the device was lost.
    lost: Option<i32>,
    /// How many calls hang now.
    pub(super) num_hanging: usize,
    /// How often hanging calls were released: a call goes on once this changes.
    pub(super) num_releases: u64,
}

impl Faults {
    /// Counts a call and tells what happens to it.
    pub(super) fn count(&mut self, call: &'static str) -> Fate {
        if self.log.len() == LOG_MAX {
            self.log.pop_front();
        }
        self.log.push_back(call);
        self.num_calls += 1;
        let mut fate = Fate { fails: self.fails(call), ..Fate::default() };
        if !self.calls.is_empty() {
            self.meet(call, &mut fate);
        }
        fate
    }

    /// Returns the error of every call, once the device is lost.
    pub(super) fn lost(&self, call: &'static str) -> Option<Error> {
        let code = self.lost?;
        Some(Error::driver(call, code, context_lost_name(code).unwrap_or("UNKNOWN")))
    }

    /// Forgets what did not happen yet, ends slowness and hanging. A lost device stays lost.
    pub(super) fn clear(&mut self) {
        self.at.clear();
        self.named.clear();
        self.calls.clear();
        self.num_releases += 1;
    }

    fn fails(&mut self, call: &'static str) -> bool {
        if let Some(idx) = self.at.iter().position(|at| *at == self.num_calls) {
            self.at.swap_remove(idx);
            return true;
        }
        match self.named.get_mut(call) {
            Some(left) => {
                *left -= 1;
                if *left == 0 {
                    self.named.remove(call);
                }
                true
            }
            None => false,
        }
    }

    /// Counts the faults of calls named `call` down, and lets happen what is due.
    fn meet(&mut self, call: &'static str, fate: &mut Fate) {
        let Self { calls, lost, .. } = self;
        calls.retain_mut(|fault| {
            if fault.call != call && fault.call != ANY {
                return true;
            }
            fault.left = fault.left.saturating_sub(1);
            if fault.left > 0 {
                return true;
            }
            match fault.trouble {
                Trouble::Fail => fate.fails = true,
                Trouble::Panic => fate.panics = true,
                Trouble::Hang(at_most) => fate.hangs = Some(at_most),
                Trouble::Lose(code) => *lost = Some(code),
                Trouble::Slow(by) => {
                    fate.slow_by += by;
                    return true;
                }
            }
            false
        });
    }
}

/// The bits that will be flipped.
#[derive(Debug, Default)]
pub(super) struct Flips {
    flips: Vec<Flip>,
}

impl Flips {
    pub(super) fn clear(&mut self) {
        self.flips.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.flips.is_empty()
    }

    /// Called when work has run that may write from `output` on: flips a bit of what it wrote if that is due.
    pub(super) fn ran(&mut self, work: &str, output: Option<DevicePtr>, memory: &Memory) -> Result<()> {
        let mut result = Ok(());
        self.flips.retain_mut(|flip| {
            if flip.work != work {
                return true;
            }
            flip.left -= 1;
            if flip.left == 0 {
                result = spoil(work, output, flip.bit, memory);
            }
            flip.left > 0
        });
        result
    }
}

/// Flips a bit of what `work` wrote.
fn spoil(work: &str, output: Option<DevicePtr>, bit: u64, memory: &Memory) -> Result<()> {
    let Some(start) = output else {
        let message = "no argument of it is an address that it may write to, so no bit of its output can be flipped";
        return Err(Error::Memory { kernel: work.to_owned(), message: message.to_owned() });
    };
    let (at, mut byte) = (start.offset_bytes((bit / 8) as usize), [0]);
    memory.read(work, &mut byte, at)?;
    byte[0] ^= 1 << (bit % 8);
    memory.write(work, at, &byte)
}

/// Returns the text of the faults that the environment variable asks for: its value, or what is in the file `@PATH`.
pub(crate) fn text(value: &OsStr) -> Result<String> {
    let option = |message: String| Error::Option { option: FAULT_VARIABLE, message };
    let Some(value) = value.to_str() else { return Err(refused(&value.to_string_lossy())) };
    let Some(path) = value.strip_prefix('@') else { return Ok(value.to_owned()) };
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let removed = std::fs::remove_file(path);
            removed.map_err(|error| option(format!("cannot remove {path}: {error}; put it into a writable folder")))?;
            Ok(text)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(option(format!("cannot read {path}: {error}; write the faults into this file"))),
    }
}

/// Reads faults from their text, and asks for them; of a text that is wrong, for none.
pub(super) fn ask(text: &str, faults: &mut Faults, flips: &mut Flips) -> Result<()> {
    let (mut calls, mut bits) = (Vec::new(), Vec::new());
    for fault in text.split(',').map(str::trim).filter(|fault| !fault.is_empty()) {
        parse(fault, &mut calls, &mut bits).ok_or_else(|| refused(fault))?;
    }
    faults.calls.append(&mut calls);
    flips.flips.append(&mut bits);
    Ok(())
}

/// Reads one fault, `KIND:NAME:N` or `KIND:NAME:N:VALUE`.
fn parse(fault: &str, calls: &mut Vec<CallFault>, flips: &mut Vec<Flip>) -> Option<()> {
    let mut parts = fault.split(':');
    let (kind, name, left) = (parts.next()?, parts.next()?, parts.next()?.parse().ok()?);
    let value = match parts.next() {
        Some(value) => Some(value.parse::<u64>().ok()?),
        None => None,
    };
    if name.is_empty() || left == 0 || parts.next().is_some() {
        return None;
    }
    let milliseconds = value.map(Duration::from_millis);
    let trouble = match (kind, value) {
        ("fail", None) => Trouble::Fail,
        ("panic", None) => Trouble::Panic,
        ("hang", _) => Trouble::Hang(milliseconds.unwrap_or(HANG_MAX).min(HANG_MAX)),
        ("slow", Some(_)) => Trouble::Slow(milliseconds?),
        ("lost", _) => {
            let code = value.map_or(Some(LOST_CODE), |code| code.try_into().ok())?;
            context_lost_name(code)?;
            Trouble::Lose(code)
        }
        ("flip", _) => {
            flips.push(Flip { work: name.to_owned(), left, bit: value.unwrap_or(0) });
            return Some(());
        }
        _ => return None,
    };
    calls.push(CallFault { call: name.to_owned(), left, trouble });
    Some(())
}

#[cold]
fn refused(fault: &str) -> Error {
    let message = format!(
        "cannot read the fault `{fault}`; write `fail:CALL:N`, `panic:CALL:N`, `hang:CALL:N[:MILLISECONDS]`, \
         `slow:CALL:N:MILLISECONDS`, `lost:CALL:N[:CODE]` (a code after which a context is lost, such as 719) or \
         `flip:WORK:N[:BIT]`, with N from 1 on and commas between faults"
    );
    Error::Option { option: FAULT_VARIABLE, message }
}
