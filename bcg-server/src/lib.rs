//! The HTTP server: routes, limits and errors in OpenAI's shape. One route per file.
//!
//! Life of a request: `listen` (a connection) → `front_door` (key, body, limits, log) → `incoming` (its turn to be read, off
//! the async threads) → `fields` checks each field → [`Engine::submit_all`] (429, 400) → the event stream becomes one JSON answer or chunks of `sse`. Dropping the connection
//! drops the event stream, which cancels.
//!
//! [`serve`] is all there is to call; [`HttpOptions`] says how.

#![forbid(unsafe_code)]

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use bcg_engine::Engine;
use tokio::net::TcpListener;

use self::drain::Drain;
use self::error::ApiError;
use self::health::Probes;
use self::incoming::Readers;
use self::listen::Server;
use self::metrics::HttpMetrics;
use self::options::Setup;

mod answers;
mod bootstrap;
mod chat;
mod client;
mod completions;
mod drain;
mod embeddings;
mod error;
mod fields;
mod flush_cache;
mod format;
mod front_door;
mod generate;
mod health;
#[cfg(feature = "otel")]
mod http_client;
mod incoming;
mod info;
mod json;
mod listen;
mod load;
mod messages;
mod metrics;
mod models;
mod options;
mod prompts;
mod request;
mod sse;
mod standby;
mod tls;
mod tokenize;
mod tools;
#[cfg(feature = "otel")]
mod trace;
#[cfg(not(feature = "otel"))]
#[path = "no_trace.rs"]
mod trace;
mod write_timeout;

pub use error::HttpError;
pub use options::{ApiKey, HttpOptions};
pub use standby::stand_by;

/// What every route sees.
#[derive(Clone)]
pub(crate) struct App {
    engine: Arc<dyn Engine>,
    metrics: HttpMetrics,
    readers: Readers,
    probes: Probes,
    drain: Drain,
}

/// Where a server listens.
#[derive(Debug)]
pub struct Listeners {
    /// For clients.
    pub public: TcpListener,
    /// For operators: `/health`, `/health_generate`, `/metrics`, `/flush_cache` and `/server_info` over plain HTTP, without
    /// a key, and whatever the public port suffers. None by default; it must not be reachable for clients.
    pub admin: Option<TcpListener>,
}

impl From<TcpListener> for Listeners {
    /// Only the public one.
    fn from(public: TcpListener) -> Self {
        Self { public, admin: None }
    }
}

/// Returns the router with every route of the server.
fn router(app: &App, setup: &Arc<Setup>) -> Router {
    let routes = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{name}", get(models::retrieve))
        .route("/v1/embeddings", post(embeddings::refuse))
        .route("/tokenize", post(tokenize::encode))
        .route("/detokenize", post(tokenize::decode))
        .route("/generate", post(generate::create).put(generate::create))
        .route("/health", get(health::health))
        .route("/health_generate", get(health::generate))
        .route("/server_info", get(info::server))
        .route("/get_server_info", get(info::server))
        .route("/model_info", get(info::model))
        .route("/get_model_info", get(info::model))
        .route("/get_load", get(load::load))
        .route("/flush_cache", post(flush_cache::flush).get(flush_cache::flush))
        .route("/metrics", get(metrics::metrics))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed);
    front_door::guard(routes, app, setup.clone()).with_state(app.clone())
}

/// Returns the router of the operators' port.
fn admin_router(app: &App, setup: &Arc<Setup>) -> Router {
    let routes = Router::new()
        .route("/health", get(health::health))
        .route("/health_generate", get(health::generate))
        .route("/metrics", get(metrics::metrics))
        .route("/flush_cache", post(flush_cache::flush).get(flush_cache::flush))
        .route("/server_info", get(info::server))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed);
    front_door::guard_operators(routes, app, setup.clone()).with_state(app.clone())
}

/// Serves until `shutdown` resolves, then takes nothing new, finishes what runs, or gives up on it at the deadline.
/// Meanwhile `/health` says that the server drains, and everything else is a 503.
///
/// # Errors
/// [`HttpError`] as [`HttpOptions::check`], before anything is served.
pub async fn serve(
    engine: Arc<dyn Engine>,
    listeners: impl Into<Listeners>,
    options: &HttpOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), HttpError> {
    let Listeners { public, admin } = listeners.into();
    let setup = Arc::new(Setup::new(options)?);
    let (metrics, drain) = (HttpMetrics::default(), Drain::default());
    let (readers, probes) = (Readers::default(), Probes::default());
    let app = App { engine, metrics: metrics.clone(), readers, probes, drain: drain.clone() };
    let (began, mut begins) = tokio::sync::watch::channel(false);
    let (engine, grace) = (app.engine.clone(), options.shutdown_grace);
    let ended = async move {
        shutdown.await;
        engine.drain();
        drain.begin();
        tracing::info!("shutting down: no new requests, running ones finish");
        let _ = began.send(true);
        drain.ended(grace).await;
    };
    let deadline = async move {
        // A dropped sender means that serving ended on its own; then there is no deadline.
        if begins.wait_for(|began| *began).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(options.shutdown_deadline).await;
    };
    let server = Server::public(router(&app, &setup), metrics.clone(), &setup);
    let admin_server = Server::operators(admin_router(&app, &setup), metrics, &setup);
    let admin = async move {
        match admin {
            Some(listener) => admin_server.run(listener, std::future::pending()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = server.run(public, ended) => {}
        () = admin => {}
        () = deadline => tracing::warn!("shutdown deadline passed: running requests are cut off"),
    }
    if let Some(tracer) = &setup.tracer {
        tracer.clone().shutdown().await;
    }
    Ok(())
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::UnknownRoute(method, uri.path().to_owned())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed(method, uri.path().to_owned())
}
