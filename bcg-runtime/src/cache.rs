//! Graphs by capture size: which are there, which may come, which go.
//!
//! Invariants: at most `graphs_max` graphs of together at most `bytes_max` are held; the least recently used goes
//! first; every graph has the same number of breaks (the census); a size that failed to capture, or that is too large
//! for the budget alone, is not tried again.
//!
//! What a graph takes of the device is measured at its capture and never at a replay. A driver takes memory in large
//! pieces, which several graphs share, and keeps them when a graph goes. So what counts is the mean of a graph node,
//! over all captures before the first graph was dropped: the sum over the graphs is then what the driver took for them,
//! and later ones, which find the gaps of dropped ones, are not taken for free.

use std::collections::BTreeMap;

use crate::graph::GraphOptions;
use crate::{
    BreakableCudaGraph, ChainReason, Context, Decision, Description, EagerReason, Error, Freeze, Ladder, LiveBatch,
    ReplayPath, Result, Runner, Timeline,
};

/// How a cache captures and replays.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CacheOptions {
    /// The capture sizes; `None` switches graphs off.
    pub ladder: Option<Ladder>,
    /// Capture a size when a batch first needs it. Otherwise only sizes captured ahead are replayed.
    pub lazy: bool,
    /// The most graphs held; beyond it the least recently used is dropped.
    pub graphs_max: usize,
    /// The most device memory that the graphs held may take, in bytes, the arena not counted; beyond it the least
    /// recently used is dropped. A size whose graph takes more than that alone is not kept, and runs eagerly from then
    /// on.
    pub bytes_max: usize,
    /// Verify every Nth replay against an eager run.
    pub verify_every: Option<u32>,
    /// The options of each graph.
    pub graph: GraphOptions,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            ladder: None,
            lazy: false,
            graphs_max: 128,
            bytes_max: usize::MAX,
            verify_every: None,
            graph: GraphOptions::default(),
        }
    }
}

/// What a cache did since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GraphCacheStats {
    /// The number of replays.
    pub num_replays: u64,
    /// The number of replays that were verified against an eager run.
    pub num_verified: u64,
    /// The numbers of replays that were, at least in part, launched segment by segment, by reason.
    pub chained: BTreeMap<ChainReason, u64>,
    /// The number of captures that succeeded.
    pub num_captures: u64,
    /// The number of captures that failed.
    pub num_capture_failures: u64,
    /// The number of graphs that were dropped to stay within the bounds.
    pub num_evictions: u64,
    /// The numbers of eager forwards, by reason.
    pub eager: BTreeMap<EagerReason, u64>,
}

impl GraphCacheStats {
    /// Returns the sums of two caches.
    #[must_use]
    pub fn merged(&self, other: &Self) -> Self {
        Self {
            num_replays: self.num_replays + other.num_replays,
            num_verified: self.num_verified + other.num_verified,
            num_captures: self.num_captures + other.num_captures,
            num_capture_failures: self.num_capture_failures + other.num_capture_failures,
            num_evictions: self.num_evictions + other.num_evictions,
            chained: sums(&self.chained, &other.chained),
            eager: sums(&self.eager, &other.eager),
        }
    }

    /// Returns how many replays were healed: one launch between two breaks that cannot be.
    pub fn num_healed(&self) -> u64 {
        self.num_replays - self.chained.values().sum::<u64>()
    }
}

/// Adds counts of equal keys.
fn sums<K: Ord + Copy>(a: &BTreeMap<K, u64>, b: &BTreeMap<K, u64>) -> BTreeMap<K, u64> {
    let mut sums = a.clone();
    b.iter().for_each(|(&key, &count)| *sums.entry(key).or_default() += count);
    sums
}

/// Graphs of one forward, by capture size.
///
/// # Example
/// ```
/// use bcg_runtime::{CacheOptions, DType, Decision, Device, GraphCache, Ladder, Runner, RunnerOptions, Tensor};
///
/// let mut options = CacheOptions::default();
/// options.ladder = Some(Ladder::explicit(vec![4, 8])?);
/// options.lazy = true;
/// let mut cache = GraphCache::<(), Tensor>::new("zeros", options);
/// let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
/// for expected in [Decision::Capture { size: 4 }, Decision::Replay { size: 4 }] {
///     let decision = cache.decide(3);
///     assert_eq!(decision, expected);
///     let zeros = match decision {
///         Decision::Capture { size } => cache.capture(size, &mut runner, &(), move |cx| {
///             let zeros = cx.empty(&[size], DType::I32)?;
///             cx.fill_zero(&zeros)?;
///             Ok(zeros)
///         })?,
///         Decision::Replay { size } => cache.replay(size, &mut runner, &())?,
///         Decision::Eager(reason) => panic!("{reason}"),
///     };
///     assert_eq!(runner.read::<i32>(&zeros)?, [0; 4]);
/// }
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Debug)]
pub struct GraphCache<L: LiveBatch, O: Freeze> {
    name: String,
    options: CacheOptions,
    graphs: BTreeMap<usize, Held<L, O>>,
    /// Sizes that are not captured again, and why.
    refused: BTreeMap<usize, EagerReason>,
    uses: u64,
    /// What captures took before the first graph was dropped.
    taken: Taken,
    stats: GraphCacheStats,
}

/// A graph that is held.
#[derive(Debug)]
struct Held<L: LiveBatch, O: Freeze> {
    graph: BreakableCudaGraph<L, O>,
    last_used: u64,
    num_nodes: usize,
}

/// Device memory that a driver took for graph nodes.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    bytes: usize,
    num_nodes: usize,
    /// A graph was dropped: later captures find its gap, so they tell nothing.
    is_final: bool,
}

impl Taken {
    /// The share of some nodes, in bytes.
    fn share(self, num_nodes: usize) -> usize {
        (self.bytes as u128 * num_nodes as u128).div_ceil(self.num_nodes.max(1) as u128) as usize
    }
}

impl<L: LiveBatch, O: Freeze> GraphCache<L, O> {
    /// Makes an empty cache.
    pub fn new(name: impl Into<String>, options: CacheOptions) -> Self {
        Self {
            name: name.into(),
            options,
            graphs: BTreeMap::new(),
            refused: BTreeMap::new(),
            uses: 0,
            taken: Taken::default(),
            stats: GraphCacheStats::default(),
        }
    }

    /// Returns the capture sizes, if graphs are on.
    pub fn ladder(&self) -> Option<&Ladder> {
        self.options.ladder.as_ref()
    }

    /// Returns what the cache did so far.
    pub fn stats(&self) -> &GraphCacheStats {
        &self.stats
    }

    /// Returns the sizes that are captured now, in rising order.
    pub fn captured_sizes(&self) -> Vec<usize> {
        self.graphs.keys().copied().collect()
    }

    /// Returns the device memory that the graphs held take, in bytes, the arena not counted.
    pub fn graph_bytes(&self) -> usize {
        self.taken.share(self.graphs.values().map(|held| held.num_nodes).sum())
    }

    /// Describes the graph of a size, if it is captured.
    pub fn describe(&self, size: usize) -> Option<Description> {
        Some(self.graphs.get(&size)?.graph.describe())
    }

    /// Decides what a forward of `rows` rows does, and counts an eager one with its reason.
    ///
    /// It uses only what all ranks share: the rows, the ladder, and which sizes are captured.
    pub fn decide(&mut self, rows: usize) -> Decision {
        let decision = self.decision(rows);
        if let Decision::Eager(reason) = decision {
            tracing::debug!(rows, %reason, "eager forward");
            *self.stats.eager.entry(reason).or_default() += 1;
        }
        decision
    }

    fn decision(&self, rows: usize) -> Decision {
        let Some(ladder) = &self.options.ladder else { return Decision::Eager(EagerReason::Disabled) };
        if rows == 0 {
            return Decision::Eager(EagerReason::NoRows);
        }
        let Some(size) = ladder.size_for(rows) else { return Decision::Eager(EagerReason::AboveLargest) };
        if size > rows.saturating_mul(2) {
            return Decision::Eager(EagerReason::TooMuchPadding);
        }
        if self.graphs.contains_key(&size) {
            return Decision::Replay { size };
        }
        match self.refused.get(&size) {
            Some(&reason) => Decision::Eager(reason),
            None if self.options.lazy => Decision::Capture { size },
            None => Decision::Eager(EagerReason::NotCaptured),
        }
    }

    /// Captures the graph of a size and returns the output of that run.
    ///
    /// The number of breaks must be that of the sizes captured before. Beyond `graphs_max` graphs or `bytes_max` bytes
    /// the least recently used ones are dropped; one that still runs on the device finishes first. A graph of more than
    /// `bytes_max` alone is not kept, but its output is good.
    ///
    /// # Errors
    /// Those of [`BreakableCudaGraph::capture`], and of [`Device::memory_info`](crate::Device::memory_info); the size
    /// is then left alone from now on.
    pub fn capture(
        &mut self,
        size: usize,
        runner: &mut Runner,
        live: &L,
        forward: impl Fn(&mut Context<'_, L>) -> Result<O> + Send + Sync + 'static,
    ) -> Result<O> {
        self.add(size, runner, |graph, runner| graph.capture(runner, live, forward))
    }

    /// Captures the graph of a size ahead of its first use, without running it where that is possible; see
    /// [`BreakableCudaGraph::capture_ahead`].
    ///
    /// # Errors
    /// As [`capture`](Self::capture).
    pub fn capture_ahead(
        &mut self,
        size: usize,
        runner: &mut Runner,
        live: &L,
        forward: impl Fn(&mut Context<'_, L>) -> Result<O> + Send + Sync + 'static,
    ) -> Result<()> {
        self.add(size, runner, |graph, runner| graph.capture_ahead(runner, live, forward))
    }

    /// Makes a graph and keeps it if its capture succeeded, and otherwise the fact that it failed.
    fn add<R>(
        &mut self,
        size: usize,
        runner: &mut Runner,
        capture: impl FnOnce(&mut BreakableCudaGraph<L, O>, &mut Runner) -> Result<R>,
    ) -> Result<R> {
        let mut graph = self.new_graph(size);
        match measured(runner, |runner| capture(&mut graph, runner)) {
            Ok((output, bytes)) => {
                self.keep(size, graph, bytes);
                Ok(output)
            }
            Err(error) => {
                tracing::warn!(size, %error, "capture failed");
                self.stats.num_capture_failures += 1;
                self.taken.is_final |= self.graphs.remove(&size).is_some();
                self.refused.insert(size, EagerReason::CaptureFailed);
                Err(error)
            }
        }
    }

    fn new_graph(&self, size: usize) -> BreakableCudaGraph<L, O> {
        let mut options = self.options.graph;
        options.expected_breaks = options.expected_breaks.or_else(|| self.num_breaks());
        BreakableCudaGraph::with_options(format!("{} of {size} rows", self.name), options)
    }

    /// Keeps a graph whose capture took `bytes` of the device, if it fits into the budget.
    fn keep(&mut self, size: usize, graph: BreakableCudaGraph<L, O>, bytes: usize) {
        let num_nodes = graph.num_exec_nodes();
        if !self.taken.is_final {
            self.taken.bytes += bytes;
            self.taken.num_nodes += num_nodes;
        }
        self.stats.num_captures += 1;
        self.uses += 1;
        let (bytes, bytes_max) = (self.taken.share(num_nodes), self.options.bytes_max);
        if bytes > bytes_max {
            tracing::warn!(size, bytes, bytes_max, "one graph takes more than all may; raise CacheOptions::bytes_max");
            (self.stats.num_evictions, self.taken.is_final) = (self.stats.num_evictions + 1, true);
            self.graphs.remove(&size);
            self.refused.insert(size, EagerReason::OverBudget);
        } else {
            self.refused.remove(&size);
            let replaced = self.graphs.insert(size, Held { graph, last_used: self.uses, num_nodes });
            self.taken.is_final |= replaced.is_some();
        }
        self.evict();
    }

    /// Replays the graph of a size.
    ///
    /// # Errors
    /// Those of [`BreakableCudaGraph::replay`], and [`Error::Mismatch`] when this replay is verified.
    pub fn replay(&mut self, size: usize, runner: &mut Runner, live: &L) -> Result<O> {
        let Some(Held { graph, last_used, num_nodes }) = self.graphs.get_mut(&size) else {
            return Err(not_captured(&self.name, size));
        };
        self.uses += 1;
        *last_used = self.uses;
        let nth = self.stats.num_replays + 1;
        let is_verified = self.options.verify_every.is_some_and(|n| nth.is_multiple_of(u64::from(n.max(1))));
        let output = if is_verified { graph.replay_verified(runner, live) } else { graph.replay(runner, live) }?;
        self.stats.num_replays = nth;
        self.stats.num_verified += u64::from(is_verified);
        if let Some(ReplayPath::Chain(reason)) = graph.last_replay() {
            *self.stats.chained.entry(reason).or_default() += 1;
            // Executables may have been made for it.
            *num_nodes = graph.num_exec_nodes();
            self.evict();
        }
        Ok(output)
    }

    /// Times the steps of a replay of a size; see [`BreakableCudaGraph::timeline`].
    ///
    /// # Errors
    /// As [`BreakableCudaGraph::replay`].
    pub fn timeline(&mut self, size: usize, runner: &mut Runner, live: &L) -> Result<Timeline> {
        let held = self.graphs.get_mut(&size).ok_or_else(|| not_captured(&self.name, size))?;
        held.graph.timeline(runner, live)
    }

    /// Drops all graphs, such as after a change of what they were captured with, and forgets what failed.
    pub fn clear(&mut self) {
        self.taken.is_final |= !self.graphs.is_empty();
        self.graphs.clear();
        self.refused.clear();
    }

    fn num_breaks(&self) -> Option<usize> {
        self.graphs.values().next().map(|held| held.graph.describe().breaks.len())
    }

    /// Drops the least recently used graphs until the others are within the bounds.
    fn evict(&mut self) {
        while self.graphs.len() > self.options.graphs_max.max(1) || self.graph_bytes() > self.options.bytes_max {
            let oldest = self.graphs.iter().min_by_key(|(_, held)| held.last_used);
            let Some((&size, _)) = oldest else { return };
            self.graphs.remove(&size);
            (self.stats.num_evictions, self.taken.is_final) = (self.stats.num_evictions + 1, true);
            tracing::debug!(size, "dropped the least recently used graph");
        }
    }
}

/// Calls `f` and returns by how much the device's free memory fell meanwhile, the growth of the arena not counted.
fn measured<R>(runner: &mut Runner, f: impl FnOnce(&mut Runner) -> Result<R>) -> Result<(R, usize)> {
    // Free memory and arena together change by what the driver takes.
    let free = |runner: &Runner| -> Result<usize> {
        Ok(runner.device().memory_info()?.free_bytes + runner.arena_stats().mapped_bytes)
    };
    let before = free(runner)?;
    let output = f(runner)?;
    let taken = before.saturating_sub(free(runner)?);
    // What is kept and what goes is the same on all ranks (law L13).
    let ranks = runner.stream_mut().ranks().cloned();
    Ok((output, ranks.map_or(Ok(taken), |ranks| ranks.max("a measuring of memory", taken))?))
}

fn not_captured(name: &str, size: usize) -> Error {
    let name = format!("{name} of {size} rows");
    Error::NotCaptured { name, reason: "this size was not captured, or was dropped" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Device, RunnerOptions, Tensor};

    const SIZES: usize = 8;

    fn rig(graphs_max: usize, bytes_max: usize) -> (GraphCache<(), Tensor>, Runner) {
        let ladder = Some(Ladder::exact(SIZES).unwrap());
        let options = CacheOptions { ladder, lazy: true, graphs_max, bytes_max, ..CacheOptions::default() };
        let runner_options = RunnerOptions { arena_bytes: 1 << 20, ..RunnerOptions::default() };
        (GraphCache::new("nodes", options), Runner::new(&Device::host(), runner_options).unwrap())
    }

    /// Uses a size, whose graph has that many nodes, and checks what it gives.
    fn use_size(cache: &mut GraphCache<(), Tensor>, runner: &mut Runner, size: usize) -> Decision {
        let decision = cache.decide(size);
        let forward = move |cx: &mut Context<'_, ()>| {
            let out = cx.empty(&[4], DType::U8)?;
            (1..=size).try_for_each(|value| cx.fill_bytes(&out, value as u8))?;
            Ok(out)
        };
        let out = match decision {
            Decision::Capture { size } => cache.capture(size, runner, &(), forward),
            Decision::Replay { size } => cache.replay(size, runner, &()),
            Decision::Eager(_) => runner.eager(&(), forward),
        };
        assert_eq!(runner.read::<u8>(&out.unwrap()).unwrap(), [size as u8; 4]);
        decision
    }

    fn bytes_of_a_node() -> usize {
        let (mut cache, mut runner) = rig(SIZES, usize::MAX);
        use_size(&mut cache, &mut runner, SIZES);
        cache.graph_bytes() / SIZES
    }

    proptest::proptest! {
        #[test]
        fn the_budgets_hold_and_the_least_recently_used_goes_first(
            sizes in proptest::collection::vec(1..=SIZES, 1..60),
            graphs_max in 1usize..6,
            nodes_max in 1usize..20,
        ) {
            let node_bytes = bytes_of_a_node();
            let bytes_max = nodes_max * node_bytes;
            let (mut cache, mut runner) = rig(graphs_max, bytes_max);
            let free_before = runner.device().memory_info().unwrap().free_bytes;
            let mut held = Vec::new(); // the most recently used last
            for size in sizes {
                let decision = use_size(&mut cache, &mut runner, size);
                if size > nodes_max {
                    assert!(matches!(decision, Decision::Capture { .. } | Decision::Eager(EagerReason::OverBudget)));
                } else {
                    assert_eq!(matches!(decision, Decision::Replay { .. }), held.contains(&size));
                    held.retain(|&other| other != size);
                    held.push(size);
                }
                while held.len() > graphs_max || held.iter().sum::<usize>() > nodes_max {
                    held.remove(0);
                }
                let mut expected = held.clone();
                expected.sort_unstable();
                assert_eq!(cache.captured_sizes(), expected);
                assert_eq!(cache.graph_bytes(), node_bytes * held.iter().sum::<usize>());
                let free = runner.device().memory_info().unwrap().free_bytes;
                assert_eq!(free_before - free, cache.graph_bytes(), "what the device says");
            }
        }
    }

    #[test]
    fn a_graph_over_the_budget_is_counted_once_and_its_size_runs_eagerly() {
        let bytes_max = 3 * bytes_of_a_node();
        let (mut cache, mut runner) = rig(SIZES, bytes_max);
        let decisions = [4, 4, 3, 4].map(|size| use_size(&mut cache, &mut runner, size));
        let over_budget = Decision::Eager(EagerReason::OverBudget);
        assert_eq!(decisions, [Decision::Capture { size: 4 }, over_budget, Decision::Capture { size: 3 }, over_budget]);
        let stats = cache.stats();
        assert_eq!((stats.num_captures, stats.num_evictions, stats.eager[&EagerReason::OverBudget]), (2, 1, 2));
    }

    #[test]
    fn a_device_without_memory_for_a_graph_runs_eagerly() {
        let (mut cache, mut runner) = rig(SIZES, usize::MAX);
        let device = runner.device().clone();
        let free = device.memory_info().unwrap().free_bytes;
        let filler = device.empty(&[free], DType::U8).unwrap();
        let refused = cache.capture(2, &mut runner, &(), |cx| {
            let out = cx.empty(&[4], DType::U8)?;
            cx.fill_zero(&out)?;
            Ok(out)
        });
        assert!(matches!(refused.unwrap_err().root(), Error::OutOfMemory { .. }));
        drop(filler);
        assert_eq!(use_size(&mut cache, &mut runner, 2), Decision::Eager(EagerReason::CaptureFailed));
        use_size(&mut cache, &mut runner, 3);
        assert_eq!(cache.captured_sizes(), [3]);
    }
}
