//! SIGTERM and ctrl-c.

/// Resolves when the process is asked to end. A second request ends it at once.
pub(crate) async fn signal() {
    requested().await;
    tokio::spawn(async {
        requested().await;
        tracing::warn!("asked to end twice: leaving at once");
        std::process::exit(130);
    });
}

#[cfg(unix)]
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

#[cfg(not(unix))]
async fn requested() {
    ctrl_c().await;
}

async fn ctrl_c() {
    if let Err(error) = tokio::signal::ctrl_c().await {
        tracing::warn!(%error, "ctrl-c cannot be watched");
        std::future::pending::<()>().await;
    }
}
