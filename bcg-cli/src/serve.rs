//! `bcg serve`, which is also `bcg-server`: loads a model and serves it over HTTP.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use bcg_benches::progress::LoadBar;
use bcg_engine::local::LocalEngine;
use bcg_engine::{Engine, EngineOptions, Health, Progress, load};

use crate::args::ServerArgs;
use crate::shutdown::{self, Shutdown};
use crate::supervise::{self, Parent};

/// Sees how far the load of a model is.
pub type OnProgress = Box<dyn FnMut(Progress) + Send>;

/// Serves until it is told to stop; `began` is when the process did.
///
/// # Errors
/// What is wrong with the flags, the files, the model or the address; that the engine gave up.
pub fn run(args: &ServerArgs, began: Instant) -> anyhow::Result<()> {
    run_with(args, began, load::start)
}

/// As [`run`], with an engine that `start` makes.
///
/// # Errors
/// As [`run`]; what `start` returns.
pub fn run_with(
    args: &ServerArgs,
    began: Instant,
    start: impl FnOnce(&EngineOptions, OnProgress) -> anyhow::Result<LocalEngine>,
) -> anyhow::Result<()> {
    let (mut options, http) = (args.engine.options(), args.http.options());
    options.served_model_name = args.served_model_name.clone();
    options.check()?;
    let (parent, listener) = match Parent::find()? {
        Some((parent, listener)) => (Some(parent), listener),
        None => (None, listen(args)?),
    };
    listener.set_nonblocking(true)?;
    if args.supervise && parent.is_none() {
        http.check()?;
        return supervise::run(args, &http, &listener);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    http.check()?;
    let engine = Arc::new(start(&options, Box::new(LoadBar::show()))?);
    // Until here a signal ends the process at once, as nothing is lost.
    let shutdown = Shutdown::watch();
    let served = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (address, model) = (listener.local_addr()?, &engine.info().name);
        let ready_ms = format!("{:.0}", began.elapsed().as_secs_f64() * 1e3);
        let scheme = if http.tls_cert.is_some() { "https" } else { "http" };
        tracing::info!(%model, ready_ms, "serving on {scheme}://{address}");
        if let Some(parent) = &parent {
            parent.ready()?;
        }
        let (ends, deadline) = (engine.clone(), http.shutdown_deadline);
        let shutdown = async move {
            tokio::select! {
                () = shutdown.asked() => {}
                _ = ends.given_up() => {}
                () = wants_end(parent) => {}
            }
            shutdown::force_after(deadline);
        };
        anyhow::Ok(bcg_server::serve(engine.clone(), listener, &http, shutdown).await?)
    });
    // A blocking task that never ends must not keep the process.
    runtime.shutdown_background();
    served?;
    match engine.health() {
        Health::Failed(error) => anyhow::bail!("the engine gave up: {error}"),
        Health::Ready | Health::Draining => {
            tracing::info!("stopped");
            Ok(())
        }
    }
}

/// Taken before the model is loaded, so that a port in use is known at once.
fn listen(args: &ServerArgs) -> anyhow::Result<TcpListener> {
    TcpListener::bind((args.host.as_str(), args.port))
        .with_context(|| format!("--host {} --port {}: cannot listen", args.host, args.port))
}

async fn wants_end(parent: Option<Parent>) {
    match parent {
        Some(parent) => parent.wants_end().await,
        None => std::future::pending().await,
    }
}
