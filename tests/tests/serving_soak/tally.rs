//! Counts of how calls ended, and what the process takes.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::time::Duration;

use super::client::End;
use super::phases::Phase;

/// How calls ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    pub(crate) answered: u64,
    pub(crate) refused: u64,
    pub(crate) overloaded: u64,
    pub(crate) failed: u64,
    pub(crate) unavailable: u64,
    pub(crate) left: u64,
    /// Choices of whole answers.
    pub(crate) num_choices: u64,
    /// How long refusals of a full queue took.
    pub(crate) waits: Vec<Duration>,
    /// What failures said, without numbers, and how often.
    pub(crate) messages: BTreeMap<String, u64>,
}

impl Tally {
    pub(crate) fn count(&mut self, end: End) {
        match end {
            End::Answered(choices) => {
                self.answered += 1;
                self.num_choices += choices.len() as u64;
            }
            End::Refused => self.refused += 1,
            End::Overloaded(wait) => {
                self.overloaded += 1;
                self.waits.push(wait);
            }
            End::Failed(message) => {
                self.failed += 1;
                let message = message.replace(|c: char| c.is_ascii_digit(), "#");
                *self.messages.entry(message).or_default() += 1;
            }
            End::Unavailable => self.unavailable += 1,
            End::Left => self.left += 1,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.answered += other.answered;
        self.refused += other.refused;
        self.overloaded += other.overloaded;
        self.failed += other.failed;
        self.unavailable += other.unavailable;
        self.left += other.left;
        self.num_choices += other.num_choices;
        self.waits.extend(&other.waits);
        for (message, count) in &other.messages {
            *self.messages.entry(message.clone()).or_default() += count;
        }
    }

    pub(crate) fn num_calls(&self) -> u64 {
        self.answered + self.refused + self.overloaded + self.failed + self.unavailable + self.left
    }

    /// The wait that this part of the refusals of a full queue kept to; zero without any.
    pub(crate) fn wait_at(&self, part: f64) -> Duration {
        let mut waits = self.waits.clone();
        waits.sort_unstable();
        let at = ((waits.len() as f64 * part) as usize).min(waits.len().saturating_sub(1));
        waits.get(at).copied().unwrap_or_default()
    }
}

/// What a soak has seen so far.
#[derive(Debug, Default)]
pub(crate) struct Record {
    phases: BTreeMap<Phase, Tally>,
    pub(crate) total: Tally,
    pub(crate) preemptions: u64,
    pub(crate) cached_tokens: u64,
    /// Behind each life.
    pub(crate) resident_bytes: Vec<usize>,
}

impl Record {
    pub(crate) fn add(&mut self, phase: Phase, tally: &Tally) {
        self.phases.entry(phase).or_default().add(tally);
        self.total.add(tally);
    }

    /// How much the process grew behind the first quarter of the lives.
    pub(crate) fn growth_bytes(&self) -> usize {
        let (marks, len) = (&self.resident_bytes, self.resident_bytes.len());
        marks[len - 1].saturating_sub(marks[len.div_ceil(4) - 1])
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| phase    |  calls | answered |  wrong |  full | failed |  gone |  left | full after p50 / p99 / worst"
        )?;
        let rows = self.phases.iter().map(|(phase, tally)| (format!("{phase:?}"), tally));
        for (name, tally) in rows.chain([("all".to_owned(), &self.total)]) {
            let [half, most, all] = [0.5, 0.99, 1.0].map(|part| tally.wait_at(part));
            writeln!(
                f,
                "| {name:8} | {:6} | {:8} | {:6} | {:5} | {:6} | {:5} | {:5} | {half:.1?} / {most:.1?} / {all:.1?}",
                tally.num_calls(),
                tally.answered,
                tally.refused,
                tally.overloaded,
                tally.failed,
                tally.unavailable,
                tally.left
            )?;
        }
        for (message, count) in &self.total.messages {
            writeln!(f, "{count:6} failed: {message}")?;
        }
        let mib: Vec<usize> = self.resident_bytes.iter().map(|bytes| bytes >> 20).collect();
        let (preemptions, cached) = (self.preemptions, self.cached_tokens);
        write!(f, "{preemptions} preemptions, {cached} tokens of prompts from the cache, resident MiB by life: {mib:?}")
    }
}

/// What this process takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process {
    pub(crate) num_threads: usize,
    pub(crate) resident_bytes: usize,
}

impl Process {
    pub(crate) fn measure() -> Self {
        let status = fs::read_to_string("/proc/self/status").expect("Linux");
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
            line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number")
        };
        Self { num_threads: number("Threads:"), resident_bytes: 1024 * number("VmRSS:") }
    }
}
