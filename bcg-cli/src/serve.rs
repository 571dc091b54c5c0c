//! `bcg serve`, which is also `bcg-server`: loads a model and serves it over HTTP.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bcg_benches::progress::LoadBar;
use bcg_engine::local::LocalEngine;
use bcg_engine::{Engine, EngineEnd, EngineOptions, Health, Progress, Replicas, load, replicas};
use bcg_server::Listeners;

use crate::args::ServerArgs;
use crate::shutdown::{self, Shutdown};
use crate::supervise::{self, Parent};

/// How much longer than its deadline a shutdown may take before the process is ended as it is: something hangs then.
const HARD_EXIT_AFTER: Duration = Duration::from_secs(5);
/// How long a process whose engine hangs still answers `/health`, so that probes learn why it ends.
const STUCK_EXIT_AFTER: Duration = Duration::from_secs(1);

/// Sees how far the load of a model is.
pub type OnProgress = Box<dyn FnMut(Progress) + Send>;

/// Serves until it is told to stop, or follows the node that does; `began` is when the process did.
///
/// # Errors
/// What is wrong with the flags, the files, the model or the address; that the engine gave up.
pub fn run(args: &ServerArgs, began: Instant) -> anyhow::Result<()> {
    run_with(args, began, replicas::start)
}

/// As [`run`], with the replicas that `start` makes.
///
/// # Errors
/// As [`run`]; what `start` returns.
pub fn run_with(
    args: &ServerArgs,
    began: Instant,
    start: impl FnOnce(&EngineOptions, OnProgress) -> anyhow::Result<Replicas<LocalEngine>>,
) -> anyhow::Result<()> {
    let (mut options, http) = (args.engine.options(), args.http.options());
    options.served_model_name = args.served_model_name.clone();
    options.check()?;
    if options.node_rank > 0 {
        anyhow::ensure!(
            !args.supervise,
            "--supervise: another node than 0 has no requests; let what started it restart it"
        );
        load::follow(&options, LoadBar::show())?;
        tracing::info!("node 0 has stopped");
        return Ok(());
    }
    // Taken before the model is loaded, so that a port in use is known at once.
    let (parent, listener) = match Parent::find()? {
        Some((parent, listener)) => (Some(parent), listener),
        None => {
            let listener = listen(&args.host, args.port);
            (None, listener.with_context(|| format!("--host {} --port {}", args.host, args.port))?)
        }
    };
    http.check()?;
    if args.supervise && parent.is_none() {
        return supervise::run(args, &http, &listener);
    }
    let admin = args.admin_port.map(|port| {
        listen(&args.admin_host, port).with_context(|| format!("--admin-host {} --admin-port {port}", args.admin_host))
    });
    let admin = admin.transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let engine = Arc::new(start(&options, Box::new(LoadBar::show()))?);
    // Until here a signal ends the process at once, as nothing is lost.
    let shutdown = Shutdown::watch();
    let served = runtime.block_on(async {
        let public = tokio::net::TcpListener::from_std(listener)?;
        let admin = admin.map(tokio::net::TcpListener::from_std).transpose()?;
        if let Some(admin) = &admin {
            tracing::info!("serving operators on http://{}", admin.local_addr()?);
        }
        let (address, model) = (public.local_addr()?, &engine.info().name);
        let ready_ms = format!("{:.0}", began.elapsed().as_secs_f64() * 1e3);
        let scheme = if http.tls_cert.is_some() { "https" } else { "http" };
        tracing::info!(%model, ready_ms, "serving on {scheme}://{address}");
        if let Some(parent) = &parent {
            parent.ready()?;
        }
        let (ends, deadline, leaves) = (engine.clone(), http.shutdown_deadline, args.watchdog_exit);
        let shutdown = async move {
            let most = tokio::select! {
                () = shutdown.asked() => deadline + HARD_EXIT_AFTER,
                most = gave_up(&ends, leaves) => most.unwrap_or(deadline + HARD_EXIT_AFTER),
                () = wants_end(parent) => deadline + HARD_EXIT_AFTER,
            };
            shutdown::force_after(most);
        };
        anyhow::Ok(bcg_server::serve(engine.clone(), Listeners { public, admin }, &http, shutdown).await?)
    });
    // A blocking task that never ends must not keep the process.
    runtime.shutdown_background();
    served?;
    match engine.health() {
        Health::Failed(error) => anyhow::bail!("the engine gave up: {error}"),
        Health::Ready | Health::Draining | Health::Degraded(_) => {
            tracing::info!("stopped");
            Ok(())
        }
    }
}

fn listen(host: &str, port: u16) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind((host, port)).context("cannot listen")?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Resolves when no replica will ever serve again; with the time that is left to the process if a call of one hangs. One
/// that hangs is only waited for if `leaves`.
async fn gave_up(engine: &Replicas<LocalEngine>, leaves: bool) -> Option<Duration> {
    match engine.given_up().await {
        EngineEnd::GaveUp(_) => None,
        EngineEnd::Stuck(_) if leaves => Some(STUCK_EXIT_AFTER),
        EngineEnd::Stuck(_) => std::future::pending().await,
    }
}

async fn wants_end(parent: Option<Parent>) {
    match parent {
        Some(parent) => parent.wants_end().await,
        None => std::future::pending().await,
    }
}
