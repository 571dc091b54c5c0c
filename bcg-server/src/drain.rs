//! The end of serving: nothing new is taken, what runs finishes, and probes hear of it meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Whether the server ends, and what it still works on. Clones are of the same server.
#[derive(Debug, Clone, Default)]
pub(crate) struct Drain {
    began: Arc<AtomicBool>,
    running: TaskTracker,
}

impl Drain {
    /// Takes nothing new from now on.
    pub(crate) fn begin(&self) {
        self.began.store(true, Ordering::SeqCst);
        self.running.close();
    }

    /// Whether nothing new is taken.
    pub(crate) fn has_begun(&self) -> bool {
        self.began.load(Ordering::SeqCst)
    }

    /// Counts a request as running until the token is dropped; `None` once the server takes nothing new.
    pub(crate) fn enter(&self) -> Option<TaskTrackerToken> {
        let token = self.running.token();
        (!self.has_begun()).then_some(token)
    }

    /// Resolves when nothing runs any more, and after `grace` at least.
    pub(crate) async fn ended(&self, grace: Duration) {
        tokio::join!(self.running.wait(), tokio::time::sleep(grace));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_waits_for_what_runs_and_takes_nothing_new() {
        let drain = Drain::default();
        let running = drain.enter().expect("open");
        drain.begin();
        assert!(drain.enter().is_none());
        let soon = Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, drain.ended(Duration::ZERO)).await.is_err());
        drop(running);
        drain.ended(soon).await;
    }
}
