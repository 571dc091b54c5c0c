//! Prometheus metrics of the engine. Whoever serves them adds others beside them, see [`Metrics::encode`].
//!
//! Of several replicas each has its own, with the label `replica`, and of two roles with the label `role`; what concerns their one queue is counted once, for the
//! whole server ([`QueueMetrics`]).
//!
//! Handles are cheap to clone and lock-free to write, so the worker updates them between steps.

use std::borrow::Cow;
use std::fmt;

use bcg_runtime::EagerReason;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::SubmitError;
use crate::model::GraphCounters;

/// Why something happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    /// A word from a closed list.
    pub reason: &'static str,
}

/// What kind of step it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PhaseLabel {
    /// `prefill`, `mixed` or `decode`.
    pub phase: &'static str,
}

/// Which rank it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RankLabel {
    /// Counted from 0.
    pub rank: u32,
}

/// What is counted of the queue, which all replicas of a server share. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct QueueMetrics {
    /// Submissions that wait: some of their answers have not run yet.
    pub depth: Gauge,
    /// Answers that wait and have not run yet.
    pub answers: Gauge,
    /// Submissions that were refused, by reason.
    pub refused: Family<ReasonLabel, Counter>,
}

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    /// What is not labelled by replica.
    of_server: Registry,
    /// Submissions that wait: some of their answers have not run yet.
    pub queue_depth: Gauge,
    /// Answers that wait and have not run yet.
    pub queued_answers: Gauge,
    /// Submissions that were refused, by reason.
    pub refused: Family<ReasonLabel, Counter>,
    /// Sequences that run.
    pub running: Gauge,
    /// KV pages in use.
    pub kv_pages_used: Gauge,
    /// KV pages that the prefix cache holds, used by sequences or not.
    pub kv_pages_cached: Gauge,
    /// KV pages there are.
    pub kv_pages: Gauge,
    /// Prompt tokens of accepted requests.
    pub prompt_tokens: Counter,
    /// Prompt tokens that the prefix cache held.
    pub cached_prompt_tokens: Counter,
    /// Tokens generated.
    pub generated_tokens: Counter,
    /// Requests by how they ended.
    pub finished: Family<ReasonLabel, Counter>,
    /// Sequences that gave their pages back.
    pub preemptions: Counter,
    /// Steps that failed.
    pub failed_steps: Counter,
    /// Steps that ran requests of a failed step again.
    pub retried_steps: Counter,
    /// From arrival to the first token.
    pub time_to_first_token: Histogram,
    /// From one token of a request to its next.
    pub inter_token_latency: Histogram,
    /// From arrival to the last token.
    pub request_latency: Histogram,
    /// Time that a step took, from the end of the one before it if it waited for that.
    pub step_time: Family<PhaseLabel, Histogram, fn() -> Histogram>,
    /// Forwards that replayed a graph.
    pub graph_replays: Counter,
    /// Replays that were, at least in part, launched segment by segment.
    pub chained_replays: Family<ReasonLabel, Counter>,
    /// Forwards that captured a graph.
    pub graph_captures: Counter,
    /// Graphs dropped to stay within their budget.
    pub graph_evictions: Counter,
    /// Device memory of the graphs held, in bytes.
    pub graph_memory: Gauge,
    /// Forwards that ran eagerly.
    pub eager_forwards: Family<ReasonLabel, Counter>,
    /// Requests that went from the prefill role to the decode role.
    pub moved_requests: Counter,
    /// Bytes of keys, values and states that were pushed for them.
    pub moved_bytes: Counter,
    /// Ranks that the model is divided among.
    pub ranks: Gauge,
    /// Device memory that each rank took when the model had been loaded, in bytes.
    pub rank_memory: Family<RankLabel, Gauge>,
    /// Ranks that were lost, and their worlds with them.
    pub lost_ranks: Family<RankLabel, Counter>,
}

fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 18))
}

impl Default for Metrics {
    /// Those of the only engine of a server.
    fn default() -> Self {
        Self::new(QueueMetrics::default(), None)
    }
}

impl Metrics {
    /// Makes those of an engine behind the queue that `queue` counts, with a label, such as `replica`, if it is one of several.
    pub fn new(queue: QueueMetrics, label: Option<(&'static str, String)>) -> Self {
        let label = label.map(|(name, value)| (Cow::from(name), Cow::from(value)));
        let mut metrics = Self {
            registry: Registry::with_prefix_and_labels("bcg", label.into_iter()),
            of_server: Registry::with_prefix("bcg"),
            queue_depth: queue.depth,
            queued_answers: queue.answers,
            refused: queue.refused,
            running: Gauge::default(),
            kv_pages_used: Gauge::default(),
            kv_pages_cached: Gauge::default(),
            kv_pages: Gauge::default(),
            prompt_tokens: Counter::default(),
            cached_prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            finished: Family::default(),
            preemptions: Counter::default(),
            failed_steps: Counter::default(),
            retried_steps: Counter::default(),
            time_to_first_token: latency(),
            inter_token_latency: latency(),
            request_latency: latency(),
            step_time: Family::new_with_constructor(latency),
            graph_replays: Counter::default(),
            chained_replays: Family::default(),
            graph_captures: Counter::default(),
            graph_evictions: Counter::default(),
            graph_memory: Gauge::default(),
            eager_forwards: Family::default(),
            moved_requests: Counter::default(),
            moved_bytes: Counter::default(),
            ranks: Gauge::default(),
            rank_memory: Family::default(),
            lost_ranks: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.of_server;
        registry.register("queue_depth", "Submissions that wait", self.queue_depth.clone());
        registry.register("queued_answers", "Requests that wait, one for each answer", self.queued_answers.clone());
        registry.register("submissions_refused", "Submissions that were refused, by reason", self.refused.clone());
        let registry = &mut self.registry;
        registry.register("running_requests", "Sequences that run", self.running.clone());
        registry.register("kv_pages_used", "KV cache pages in use", self.kv_pages_used.clone());
        registry.register("kv_pages_cached", "KV cache pages in the prefix cache", self.kv_pages_cached.clone());
        registry.register("kv_pages", "KV cache pages there are", self.kv_pages.clone());
        registry.register("prompt_tokens", "Prompt tokens of accepted requests", self.prompt_tokens.clone());
        let help = "Prompt tokens that the prefix cache held";
        registry.register("cached_prompt_tokens", help, self.cached_prompt_tokens.clone());
        registry.register("generated_tokens", "Tokens generated", self.generated_tokens.clone());
        registry.register("requests_finished", "Requests by how they ended", self.finished.clone());
        registry.register("preemptions", "Sequences that gave their pages back", self.preemptions.clone());
        registry.register("failed_steps", "Steps that failed", self.failed_steps.clone());
        let help = "Steps that ran requests of a failed step again";
        registry.register("retried_steps", help, self.retried_steps.clone());
        registry.register("graph_replays", "Forwards that replayed a graph", self.graph_replays.clone());
        let help = "Replays that were, at least in part, launched segment by segment, by reason";
        registry.register("chained_replays", help, self.chained_replays.clone());
        registry.register("graph_captures", "Forwards that captured a graph", self.graph_captures.clone());
        let help = "Graphs dropped to stay within their budget";
        registry.register("graph_evictions", help, self.graph_evictions.clone());
        let help = "Device memory of the graphs held";
        registry.register_with_unit("graph_memory", help, Unit::Bytes, self.graph_memory.clone());
        registry.register("eager_forwards", "Forwards that ran eagerly, by reason", self.eager_forwards.clone());
        let help = "Requests that went from the prefill role to the decode role";
        registry.register("moved_requests", help, self.moved_requests.clone());
        let help = "Keys, values and states that were pushed for them";
        registry.register_with_unit("moved", help, Unit::Bytes, self.moved_bytes.clone());
        registry.register("ranks", "Ranks that the model is divided among", self.ranks.clone());
        let help = "Device memory that each rank took when the model had been loaded";
        registry.register_with_unit("rank_memory", help, Unit::Bytes, self.rank_memory.clone());
        let help = "Ranks that were lost, and their worlds with them";
        registry.register("lost_ranks", help, self.lost_ranks.clone());
        let seconds = [
            ("time_to_first_token", "From arrival to the first token", self.time_to_first_token.clone()),
            ("inter_token_latency", "From one token of a request to its next", self.inter_token_latency.clone()),
            ("request_latency", "From arrival to the last token", self.request_latency.clone()),
        ];
        for (name, help, histogram) in seconds {
            registry.register_with_unit(name, help, Unit::Seconds, histogram);
        }
        registry.register_with_unit("step_time", "Time that a step took", Unit::Seconds, self.step_time.clone());
    }

    /// Counts the end of a request.
    pub fn count_finished(&self, reason: &'static str) {
        self.finished.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Counts a submission that was refused.
    pub fn count_refused(&self, error: &SubmitError) {
        let reason = match error {
            SubmitError::QueueFull { .. } => "queue_full",
            SubmitError::CompilersBusy => "compilers_busy",
            SubmitError::Cancelled => "cancelled",
            SubmitError::ShuttingDown => "shutting_down",
            SubmitError::ContextLength { .. } | SubmitError::PromptTooLong { .. } => "context_length",
            SubmitError::Prompt(_) => "wrong",
            SubmitError::Stopped(_) => "stopped",
        };
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Takes over what each rank of a new model takes of its device.
    pub fn take_ranks(&self, bytes: &[usize]) {
        self.ranks.set(i64::try_from(bytes.len()).unwrap_or(i64::MAX));
        for (rank, &bytes) in (0..).zip(bytes) {
            self.rank_memory.get_or_create(&RankLabel { rank }).set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    /// Counts a rank that was lost.
    pub fn count_lost_rank(&self, rank: usize) {
        let rank = u32::try_from(rank).unwrap_or(u32::MAX);
        self.lost_ranks.get_or_create(&RankLabel { rank }).inc();
    }

    /// Adds what a runner did since it had done `counted`, which is nothing for a new one, and takes over what its graphs
    /// take.
    pub fn take_stats(&self, stats: &GraphCounters, counted: &GraphCounters) {
        self.graph_replays.inc_by(stats.replays.saturating_sub(counted.replays));
        self.graph_captures.inc_by(stats.captures.saturating_sub(counted.captures));
        self.graph_evictions.inc_by(stats.evictions.saturating_sub(counted.evictions));
        self.graph_memory.set(i64::try_from(stats.graph_bytes).unwrap_or(i64::MAX));
        let reasons = [
            (&self.chained_replays, &stats.chained, &counted.chained),
            (&self.eager_forwards, &stats.eager, &counted.eager),
        ];
        for (family, counts, counted) in reasons {
            for &(reason, count) in counts {
                let before = counted.iter().find(|(known, _)| *known == reason).map_or(0, |(_, count)| *count);
                family.get_or_create(&ReasonLabel { reason }).inc_by(count.saturating_sub(before));
            }
        }
    }

    /// Returns how many forwards ran eagerly, for whatever reason.
    pub fn num_eager(&self) -> u64 {
        let reasons = EagerReason::ALL.map(|reason| ReasonLabel { reason: reason.name() });
        reasons.iter().filter_map(|reason| Some(self.eager_forwards.get(reason)?.get())).sum()
    }

    /// Appends all metrics as OpenMetrics text, without the line that ends such a text, so that others can follow.
    ///
    /// # Errors
    /// The text's; one for a `String` never comes.
    pub fn encode(&self, text: &mut String) -> fmt::Result {
        Self::encode_all(&[self], text)
    }

    /// As [`encode`](Self::encode), of all replicas of a server: what concerns the whole server once, then each family of
    /// metrics once, with the samples of every replica, as OpenMetrics wants it.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_all(replicas: &[&Self], text: &mut String) -> fmt::Result {
        let Some(first) = replicas.first() else { return Ok(()) };
        encode_registry(text, &first.of_server)?;
        // What describes a family, which is the same for all replicas, and its samples.
        let mut families: Vec<(String, String)> = Vec::new();
        for metrics in replicas {
            let mut own = String::new();
            encode_registry(&mut own, &metrics.registry)?;
            let mut lines = own.split_inclusive('\n').peekable();
            while lines.peek().is_some() {
                let head: String = std::iter::from_fn(|| lines.next_if(|line| line.starts_with('#'))).collect();
                let samples = std::iter::from_fn(|| lines.next_if(|line| !line.starts_with('#')));
                let at = families.iter().position(|(known, _)| *known == head).unwrap_or_else(|| {
                    families.push((head, String::new()));
                    families.len() - 1
                });
                families[at].1.extend(samples);
            }
        }
        families.iter().for_each(|(head, samples)| text.extend([head.as_str(), samples]));
        Ok(())
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("running", &self.running.get()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(metrics: &Metrics) -> String {
        let mut text = String::new();
        metrics.encode(&mut text).expect("a string takes everything");
        text
    }

    #[test]
    fn metrics_are_openmetrics_text_that_others_can_follow() {
        let metrics = Metrics::default();
        metrics.time_to_first_token.observe(0.01);
        let text = text(&metrics);
        assert!(text.contains("bcg_time_to_first_token_seconds_count 1"), "{text}");
        assert!(!text.contains("# EOF"), "{text}");
    }

    #[test]
    fn ranks_have_metrics_of_their_own() {
        let metrics = Metrics::default();
        metrics.take_ranks(&[300, 200]);
        metrics.count_lost_rank(1);
        let text = text(&metrics);
        for line in ["bcg_ranks 2", "bcg_rank_memory_bytes{rank=\"0\"} 300", "bcg_lost_ranks_total{rank=\"1\"} 1"] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn replicas_have_one_text_with_every_family_once() {
        let queue = QueueMetrics::default();
        let replicas = [0, 1].map(|index| Metrics::new(queue.clone(), Some(("replica", index.to_string()))));
        replicas[0].count_refused(&SubmitError::ShuttingDown);
        replicas[1].count_refused(&SubmitError::ShuttingDown);
        replicas[1].count_finished("stop");
        replicas[1].request_latency.observe(0.01);
        let mut text = String::new();
        Metrics::encode_all(&[&replicas[0], &replicas[1]], &mut text).expect("a string takes everything");
        for line in [
            "bcg_submissions_refused_total{reason=\"shutting_down\"} 2\n",
            "bcg_requests_finished_total{replica=\"1\",reason=\"stop\"} 1\n",
            "bcg_running_requests{replica=\"0\"} 0\nbcg_running_requests{replica=\"1\"} 0\n",
            "bcg_request_latency_seconds_count{replica=\"1\"} 1\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        // A family that only one replica has samples of stands there once too.
        let mut heads: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let num_heads = heads.len();
        heads.sort_unstable();
        heads.dedup();
        assert_eq!((heads.len(), num_heads > 20), (num_heads, true), "{text}");
        let alone = self::text(&Metrics::default());
        assert!(alone.contains("bcg_running_requests 0\n") && !alone.contains("replica="), "{alone}");
    }

    #[test]
    fn a_runners_counters_are_taken_over_once_and_add_to_those_of_the_one_before() {
        let metrics = Metrics::default();
        let (eager, chained) = (vec![("too_large", 3)], vec![("work_changed", 4)]);
        let stats = GraphCounters { replays: 5, chained, captures: 2, evictions: 1, graph_bytes: 4096, eager };
        metrics.take_stats(&stats, &GraphCounters::default());
        metrics.take_stats(&stats, &stats);
        let anew = GraphCounters { replays: 3, eager: vec![("too_large", 1)], ..GraphCounters::default() };
        metrics.take_stats(&anew, &GraphCounters::default());
        let text = text(&metrics);
        assert!(text.contains("bcg_graph_replays_total 8"), "{text}");
        assert!(text.contains("bcg_graph_evictions_total 1"), "{text}");
        assert!(text.contains("bcg_graph_memory_bytes 0"), "{text}");
        assert!(text.contains("bcg_chained_replays_total{reason=\"work_changed\"} 4"), "{text}");
        assert!(text.contains("bcg_eager_forwards_total{reason=\"too_large\"} 4"), "{text}");
    }
}
