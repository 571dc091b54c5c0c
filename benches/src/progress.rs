//! Progress bars of whatever takes long: loads, captures, timed rounds. They are shown on a terminal only.

use std::time::Duration;

use bcg_models::{Progress, Stage};
use indicatif::{ProgressBar, ProgressStyle};

/// The bar of a load: one stage after the other.
#[derive(Debug, Default)]
pub struct LoadBar {
    bar: Option<(Stage, ProgressBar)>,
}

impl LoadBar {
    /// Returns what shows each progress of a load in a bar.
    pub fn show() -> impl FnMut(Progress) + Send + 'static {
        let mut bar = Self::default();
        move |progress| bar.update(progress)
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
        }
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for LoadBar {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Makes a progress bar that hides itself when the output is no terminal.
pub fn bar(total: u64, template: &str, message: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style).with_message(message);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
