//! SIGTERM and ctrl-c.

use std::process::exit;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use tokio::sync::watch;

/// How long the process may take to run what libraries do at its end, before it is killed.
const EXIT_TIME: Duration = Duration::from_secs(1);
/// The exit status of a process that was told twice to end.
const TOLD_TWICE: i32 = 130;

/// Whether the process was asked to end. It is watched on a thread of its own, so that nothing that hangs can hide it.
#[derive(Debug, Clone)]
pub(crate) struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Begins to watch. A second request ends the process at once.
    pub(crate) fn watch() -> Self {
        let (sender, receiver) = watch::channel(false);
        let thread = std::thread::Builder::new().name("bcg-signals".into()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return tracing::warn!(%error, "signals cannot be watched"),
            };
            runtime.block_on(async {
                requested().await;
                let _ = sender.send(true);
                requested().await;
                tracing::warn!("asked to end twice: leaving at once");
                exit(TOLD_TWICE);
            });
        });
        if let Err(error) = thread {
            tracing::warn!(%error, "signals cannot be watched");
        }
        Self(receiver)
    }

    /// Resolves when the process is asked to end.
    pub(crate) async fn asked(mut self) {
        if self.0.wait_for(|asked| *asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Ends the process as it is, with an error, if it has not ended by itself after this time.
pub(crate) fn force_after(patience: Duration) {
    let thread = std::thread::Builder::new().name("bcg-hard-exit".into()).spawn(move || {
        std::thread::sleep(patience);
        tracing::error!("something hangs and does not let the process end: leaving as it is");
        std::thread::spawn(|| {
            std::thread::sleep(EXIT_TIME);
            // The driver's own end waits for kernels that still run.
            if let Err(error) = kill_process(getpid(), Signal::KILL) {
                tracing::error!(%error, "the process cannot be killed");
            }
        });
        exit(1);
    });
    if let Err(error) = thread {
        tracing::warn!(%error, "a shutdown that hangs is not ended");
    }
}

async fn requested() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => tokio::select! {
            _ = terminate.recv() => {}
            () = ctrl_c() => {}
        },
        Err(error) => {
            tracing::warn!(%error, "SIGTERM cannot be watched");
            ctrl_c().await;
        }
    }
}

async fn ctrl_c() {
    if let Err(error) = tokio::signal::ctrl_c().await {
        tracing::warn!(%error, "ctrl-c cannot be watched");
        std::future::pending::<()>().await;
    }
}
