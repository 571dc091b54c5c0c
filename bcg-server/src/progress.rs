//! Progress bars while the model loads and graphs are captured, and the summary line at the end.
//!
//! Bars go to the terminal only; a log file sees the summary lines.

use std::time::{Duration, Instant};

use bcg_models::{CaptureSummary, ModelRunner, Progress, Stage};
use indicatif::{ProgressBar, ProgressStyle};

/// The bars of one load.
#[derive(Debug)]
pub struct LoadProgress {
    began: Instant,
    /// When the latest stage ended.
    stage_began: Instant,
    bar: Option<(Stage, ProgressBar)>,
}

impl Default for LoadProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl LoadProgress {
    /// Starts the clock; bars appear with the first update.
    pub fn new() -> Self {
        let now = Instant::now();
        Self { began: now, stage_began: now, bar: None }
    }

    /// Shows how far the load is.
    pub fn update(&mut self, progress: Progress) {
        let Progress { stage, done, total } = progress;
        let bar = match &self.bar {
            Some((current, bar)) if *current == stage => bar,
            _ => {
                self.clear();
                let template = match stage {
                    Stage::LoadWeights => "{msg:>17} [{bar:40}] {bytes}/{total_bytes}",
                    _ => "{msg:>17} [{bar:40}] {pos}/{len} {eta}",
                };
                &self.bar.insert((stage, bar(total as u64, template, stage.name()))).1
            }
        };
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        if done == total {
            self.clear();
            self.stage_ended(stage.name());
        }
    }

    /// Logs how long a stage took, all that happened since the stage before included.
    pub fn stage_ended(&mut self, name: &str) {
        let ms = self.stage_began.elapsed().as_secs_f64() * 1e3;
        tracing::info!(ms = format_args!("{ms:.0}"), "{name}");
        self.stage_began = Instant::now();
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Removes the bars and logs what was loaded and captured.
    pub fn finish(mut self, runner: &ModelRunner, captured: Option<&CaptureSummary>) {
        self.clear();
        let options = runner.options();
        tracing::info!(
            device = runner.device().name(),
            context_length = options.context_length,
            kv_cache_tokens = options.kv_cache_tokens,
            seconds = format_args!("{:.2}", self.began.elapsed().as_secs_f64()),
            "model loaded"
        );
        match captured {
            Some(summary) => tracing::info!("{}", summary_line(summary)),
            None => tracing::info!(mode = ?options.graph, "no graphs captured ahead"),
        }
    }
}

/// Makes a progress bar that hides itself when the output is no terminal.
pub fn bar(total: u64, template: &str, message: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style).with_message(message);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Says in one line what was captured.
pub fn summary_line(summary: &CaptureSummary) -> String {
    let range = |sizes: &[usize], unit: &str| match sizes {
        [] => format!("no size ({unit})"),
        [only] => format!("1 size ({only} {unit})"),
        [first, .., last] => format!("{} sizes ({first}..{last} {unit})", sizes.len()),
    };
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    format!(
        "captured prefill: {}, {} segments and {} breaks each; decode: {}; in {:.2} s; {:.1} MiB of activations and \
         {:.1} MiB of graphs",
        range(&summary.prefill_sizes, "tokens"),
        summary.segments,
        summary.breaks,
        range(&summary.decode_sizes, "sequences"),
        summary.capture_time.as_secs_f64(),
        mib(summary.arena_bytes),
        mib(summary.graph_bytes),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_sizes_segments_breaks_time_and_memory() {
        let summary = CaptureSummary {
            prefill_sizes: vec![1, 2, 512],
            decode_sizes: vec![1],
            segments: 5,
            breaks: 4,
            capture_time: Duration::from_millis(830),
            arena_bytes: 5 << 20,
            graph_bytes: 3 << 19,
        };
        assert_eq!(
            summary_line(&summary),
            "captured prefill: 3 sizes (1..512 tokens), 5 segments and 4 breaks each; decode: 1 size (1 sequences); in \
             0.83 s; 5.0 MiB of activations and 1.5 MiB of graphs"
        );
    }
}
