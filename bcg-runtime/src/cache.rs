//! Graphs by capture size: which are there, which may come, which go.
//!
//! Invariants: at most `graphs_max` graphs are held; the least recently used goes first; every graph has the same
//! number of breaks (the census); a size that failed to capture is not tried again.

use std::collections::BTreeMap;

use crate::graph::GraphOptions;
use crate::{
    BreakableCudaGraph, Context, Decision, Description, EagerReason, Error, Freeze, Ladder, LiveBatch, Result, Runner,
};

/// How a cache captures and replays.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// The capture sizes; `None` switches graphs off.
    pub ladder: Option<Ladder>,
    /// Capture a size when a batch first needs it. Otherwise only sizes captured ahead are replayed.
    pub lazy: bool,
    /// The most graphs held; beyond it the least recently used is dropped.
    pub graphs_max: usize,
    /// Verify every Nth replay against an eager run.
    pub verify_every: Option<u32>,
    /// Graphs of at least this size share executables among equal segments; see [`GraphOptions::shares_executables`].
    pub share_from: usize,
    /// The options of each graph.
    pub graph: GraphOptions,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self {
            ladder: None,
            lazy: false,
            graphs_max: 128,
            verify_every: None,
            share_from: usize::MAX,
            graph: GraphOptions::default(),
        }
    }
}

/// What a cache did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GraphCacheStats {
    /// Replays.
    pub num_replays: u64,
    /// Those verified against an eager run.
    pub num_verified: u64,
    /// Captures that succeeded.
    pub num_captures: u64,
    /// Captures that failed.
    pub num_capture_failures: u64,
    /// Graphs dropped to stay within the bound.
    pub num_evictions: u64,
    /// Eager forwards, by reason.
    pub eager: BTreeMap<EagerReason, u64>,
}

impl GraphCacheStats {
    /// Returns the sums of two caches.
    #[must_use]
    pub fn merged(&self, other: &Self) -> Self {
        let mut eager = self.eager.clone();
        for (&reason, &count) in &other.eager {
            *eager.entry(reason).or_default() += count;
        }
        Self {
            num_replays: self.num_replays + other.num_replays,
            num_verified: self.num_verified + other.num_verified,
            num_captures: self.num_captures + other.num_captures,
            num_capture_failures: self.num_capture_failures + other.num_capture_failures,
            num_evictions: self.num_evictions + other.num_evictions,
            eager,
        }
    }
}

/// Graphs of one forward, by capture size.
///
/// # Example
/// ```
/// use bcg_runtime::{CacheOptions, DType, Decision, Device, GraphCache, Ladder, Runner, RunnerOptions, Tensor};
///
/// let ladder = Some(Ladder::explicit(vec![4, 8])?);
/// let mut cache = GraphCache::<(), Tensor>::new("zeros", CacheOptions { ladder, lazy: true, ..Default::default() });
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
    graphs: BTreeMap<usize, Entry<L, O>>,
    uses: u64,
    stats: GraphCacheStats,
}

#[derive(Debug)]
enum Entry<L: LiveBatch, O: Freeze> {
    Graph { graph: BreakableCudaGraph<L, O>, last_used: u64 },
    Failed,
}

impl<L: LiveBatch, O: Freeze> GraphCache<L, O> {
    /// Makes an empty cache.
    pub fn new(name: impl Into<String>, options: CacheOptions) -> Self {
        Self { name: name.into(), options, graphs: BTreeMap::new(), uses: 0, stats: GraphCacheStats::default() }
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
        let is_graph = |(&size, entry): (&usize, &Entry<L, O>)| matches!(entry, Entry::Graph { .. }).then_some(size);
        self.graphs.iter().filter_map(is_graph).collect()
    }

    /// Describes the graph of a size, if it is captured.
    pub fn describe(&self, size: usize) -> Option<Description> {
        match self.graphs.get(&size)? {
            Entry::Graph { graph, .. } => Some(graph.describe()),
            Entry::Failed => None,
        }
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
        if size > 2 * rows {
            return Decision::Eager(EagerReason::TooMuchPadding);
        }
        match self.graphs.get(&size) {
            Some(Entry::Graph { .. }) => Decision::Replay { size },
            Some(Entry::Failed) => Decision::Eager(EagerReason::CaptureFailed),
            None if self.options.lazy => Decision::Capture { size },
            None => Decision::Eager(EagerReason::NotCaptured),
        }
    }

    /// Captures the graph of a size and returns the output of that run.
    ///
    /// The number of breaks must be that of the sizes captured before. Beyond `graphs_max` graphs the least recently
    /// used one is dropped; one that still runs on the device finishes first.
    ///
    /// # Errors
    /// Those of [`BreakableCudaGraph::capture`]; the size is then left alone from now on.
    pub fn capture(
        &mut self,
        size: usize,
        runner: &mut Runner,
        live: &L,
        forward: impl Fn(&mut Context<'_, L>) -> Result<O> + Send + Sync + 'static,
    ) -> Result<O> {
        let mut graph = self.new_graph(size);
        let output = graph.capture(runner, live, forward);
        self.keep(size, graph, output)
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
        let mut graph = self.new_graph(size);
        let captured = graph.capture_ahead(runner, live, forward);
        self.keep(size, graph, captured)
    }

    fn new_graph(&self, size: usize) -> BreakableCudaGraph<L, O> {
        let mut options = self.options.graph;
        options.expected_breaks = options.expected_breaks.or_else(|| self.num_breaks());
        options.shares_executables |= size >= self.options.share_from;
        BreakableCudaGraph::with_options(format!("{} of {size} rows", self.name), options)
    }

    /// Keeps a graph if its capture succeeded, and otherwise the fact that it failed.
    fn keep<R>(&mut self, size: usize, graph: BreakableCudaGraph<L, O>, captured: Result<R>) -> Result<R> {
        match &captured {
            Ok(_) => {
                self.stats.num_captures += 1;
                self.uses += 1;
                self.graphs.insert(size, Entry::Graph { graph, last_used: self.uses });
                self.evict();
            }
            Err(error) => {
                tracing::warn!(size, %error, "capture failed");
                self.stats.num_capture_failures += 1;
                self.graphs.insert(size, Entry::Failed);
            }
        }
        captured
    }

    /// Replays the graph of a size.
    ///
    /// # Errors
    /// Those of [`BreakableCudaGraph::replay`], and [`Error::Mismatch`] when this replay is verified.
    pub fn replay(&mut self, size: usize, runner: &mut Runner, live: &L) -> Result<O> {
        let Some(Entry::Graph { graph, last_used }) = self.graphs.get_mut(&size) else {
            let name = format!("{} of {size} rows", self.name);
            return Err(Error::NotCaptured { name, reason: "this size was not captured, or was dropped" });
        };
        self.uses += 1;
        *last_used = self.uses;
        self.stats.num_replays += 1;
        let is_verified =
            self.options.verify_every.is_some_and(|n| self.stats.num_replays.is_multiple_of(u64::from(n.max(1))));
        if !is_verified {
            return graph.replay(runner, live);
        }
        self.stats.num_verified += 1;
        graph.replay_verified(runner, live)
    }

    /// Drops all graphs, such as after a change of what they were captured with.
    pub fn clear(&mut self) {
        self.graphs.clear();
    }

    fn num_breaks(&self) -> Option<usize> {
        self.graphs.values().find_map(|entry| match entry {
            Entry::Graph { graph, .. } => Some(graph.describe().breaks.len()),
            Entry::Failed => None,
        })
    }

    fn evict(&mut self) {
        while self.captured_sizes().len() > self.options.graphs_max.max(1) {
            let oldest = self.graphs.iter().filter_map(|(&size, entry)| match entry {
                Entry::Graph { last_used, .. } => Some((*last_used, size)),
                Entry::Failed => None,
            });
            let Some((_, size)) = oldest.min() else { return };
            self.graphs.remove(&size);
            self.stats.num_evictions += 1;
            tracing::debug!(size, "dropped the least recently used graph");
        }
    }
}
