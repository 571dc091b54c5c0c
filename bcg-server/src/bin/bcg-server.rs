//! `bcg-server`: loads a model and serves it over HTTP.

#![forbid(unsafe_code)]

use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use bcg_server::api;
use bcg_server::args::ServerArgs;
use bcg_server::engine::{Engine, Health, load};
use bcg_server::error::one_line;
use bcg_server::{logging, shutdown};
use clap::Parser;

fn main() -> ExitCode {
    let began = Instant::now();
    let args = ServerArgs::parse();
    logging::init(args.log_format);
    match run(&args, began) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bcg-server: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Serves until it is told to stop; `began` is when the process did.
fn run(args: &ServerArgs, began: Instant) -> anyhow::Result<()> {
    let plan = args.engine.plan()?;
    // Taken before the model is loaded, so that a port in use is known at once.
    let address = (args.host.as_str(), args.port);
    let listener = TcpListener::bind(address)
        .with_context(|| format!("--host {} --port {}: cannot listen", args.host, args.port))?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let options = runtime.block_on(async { args.http.options() })?;
    let engine = Arc::new(load::start(&plan, args.served_model_name.clone())?);
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (address, model) = (listener.local_addr()?, &engine.info().name);
        let ready_ms = format!("{:.0}", began.elapsed().as_secs_f64() * 1e3);
        let scheme = if options.tls.is_some() { "https" } else { "http" };
        tracing::info!(%model, ready_ms, "serving on {scheme}://{address}");
        let ends = engine.clone();
        let shutdown = async move {
            tokio::select! {
                () = shutdown::signal() => {}
                () = ends.given_up() => {}
            }
        };
        api::serve(listener, engine.clone(), options, shutdown).await;
        anyhow::Ok(())
    })?;
    match engine.health() {
        Health::Failed(error) => anyhow::bail!("the engine gave up: {error}"),
        Health::Ready | Health::Draining => {
            tracing::info!("stopped");
            Ok(())
        }
    }
}
