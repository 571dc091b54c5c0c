//! What the GPU did during a forward: each kernel's time, and how much of the wall time some kernel ran.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use bcg_runtime::{Device, KernelRun};

use super::report::Report;

/// What the profile's columns mean; goes with its tables.
pub(super) const NOTE: &str = "\
profile, of one forward: kernels_ms is the sum of the kernels' own times, busy_ms the time in which at least one ran (a \
kernel that is launched early overlaps its predecessor), and span_ms the time from the first kernel's start to the last \
one's end, all traced by CUPTI in runs of their own; busy_percent is busy_ms of span_ms. wall_ms is the untraced median, \
of runs back to back, in which the GPU may clock lower.";

/// Forwards that are traced.
const TRACED: usize = 5;

/// What the kernels of one forward took.
#[derive(Debug)]
pub(super) struct Profile {
    runs: Vec<KernelRun>,
    forwards: usize,
}

impl Profile {
    /// Traces some forwards, after one that is not traced.
    ///
    /// # Errors
    /// The forward's; [`bcg_runtime::Error::Trace`] where kernels cannot be traced.
    pub(super) fn trace(device: &Device, mut forward: impl FnMut() -> Result<()>) -> Result<Self> {
        forward()?;
        let (result, runs) = device
            .trace_kernels(|| (0..TRACED).try_for_each(|_| forward()))
            .context("--profile: drop it, or use a GPU with the CUDA toolkit")?;
        result?;
        ensure!(!runs.is_empty(), "--profile: CUPTI saw no kernel; does another profiler run?");
        Ok(Self { runs, forwards: TRACED })
    }

    /// Adds a row to the table `profile`, and one for each kernel to `profile by kernel`.
    pub(super) fn rows(&self, report: &mut Report, model: &str, size: (&'static str, usize), wall_ms: f64) {
        let per_forward = |ns: u64| ns as f64 / 1e6 / self.forwards as f64;
        let sum = per_forward(self.runs.iter().map(duration).sum());
        let busy = per_forward(union_ns(&self.runs));
        let span = per_forward(self.runs.chunks(self.runs.len().div_ceil(self.forwards)).map(span_ns).sum());
        report.row(
            "profile",
            vec![
                ("model", model.into()),
                (size.0, size.1.into()),
                ("wall_ms", wall_ms.into()),
                ("kernels", (self.runs.len() / self.forwards).into()),
                ("kernels_ms", sum.into()),
                ("busy_ms", busy.into()),
                ("span_ms", span.into()),
                ("busy_percent", (100.0 * busy / span).into()),
            ],
        );
        for (name, count, ns) in self.by_name() {
            report.row(
                "profile by kernel",
                vec![
                    ("model", model.into()),
                    (size.0, size.1.into()),
                    ("kernel", name.into()),
                    ("count", (count / self.forwards).into()),
                    ("ms", per_forward(ns).into()),
                    ("share_percent", (100.0 * per_forward(ns) / sum).into()),
                ],
            );
        }
    }

    /// Returns each kernel's name, runs and nanoseconds, the longest first.
    fn by_name(&self) -> Vec<(&str, usize, u64)> {
        let mut by_name = BTreeMap::<&str, (usize, u64)>::new();
        for run in &self.runs {
            let (count, ns) = by_name.entry(&run.name).or_default();
            (*count, *ns) = (*count + 1, *ns + duration(run));
        }
        let mut rows: Vec<_> = by_name.into_iter().map(|(name, (count, ns))| (name, count, ns)).collect();
        rows.sort_by_key(|&(_, _, ns)| std::cmp::Reverse(ns));
        rows
    }
}

fn duration(run: &KernelRun) -> u64 {
    run.end_ns - run.start_ns
}

/// Nanoseconds from the first start to the last end.
pub(super) fn span_ns(runs: &[KernelRun]) -> u64 {
    let start = runs.iter().map(|run| run.start_ns).min().unwrap_or(0);
    runs.iter().map(|run| run.end_ns).max().unwrap_or(0) - start
}

/// Nanoseconds in which at least one kernel ran; `runs` are in the order of their starts.
pub(super) fn union_ns(runs: &[KernelRun]) -> u64 {
    let (mut covered, mut end) = (0, 0);
    for run in runs {
        covered += run.end_ns.saturating_sub(run.start_ns.max(end));
        end = end.max(run.end_ns);
    }
    covered
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Environment;

    fn run(name: &str, start_ns: u64, end_ns: u64) -> KernelRun {
        KernelRun { name: name.to_owned(), start_ns, end_ns, stream_id: 0, device_id: 0, launch_ns: None }
    }

    #[test]
    fn overlapping_kernels_count_once_as_busy_and_gaps_do_not() {
        let runs = [run("a", 10, 20), run("b", 15, 18), run("c", 18, 25), run("d", 40, 41)];
        assert_eq!(union_ns(&runs), 16);
    }

    #[test]
    fn a_profile_is_of_one_forward_and_its_shares_make_a_whole() {
        let runs = vec![run("a", 0, 1_000_000), run("b", 2_000_000, 5_000_000), run("a", 6_000_000, 7_000_000)];
        let profile = Profile { runs: [runs.clone(), runs].concat(), forwards: 2 };
        assert_eq!(profile.by_name(), [("b", 2, 6_000_000), ("a", 4, 4_000_000)]);
        let mut report = Report::new(Environment::read("test"));
        profile.rows(&mut report, "m", ("tokens", 16), 10.0);
        let json = report.json();
        let rows = json["rows"].as_array().expect("rows");
        assert_eq!((&rows[0]["kernels"], &rows[0]["kernels_ms"]), (&3.into(), &5.0.into()));
        assert_eq!((&rows[0]["span_ms"], &rows[0]["wall_ms"]), (&7.0.into(), &10.0.into()));
        assert_eq!((&rows[1]["kernel"], &rows[1]["share_percent"]), (&"b".into(), &60.0.into()));
        assert_eq!((&rows[2]["count"], &rows[2]["ms"]), (&2.into(), &2.0.into()));
    }

    #[test]
    fn the_host_device_says_that_it_cannot_be_profiled() {
        let error = Profile::trace(&Device::host(), || Ok(())).expect_err("no GPU");
        assert!(format!("{error:#}").contains("runs no kernel on a GPU"), "{error:#}");
    }
}
