//! The HTTP server: routes, limits and errors in OpenAI's shape. One route per file.
//!
//! Life of a request: `listen` (a connection) → `front_door` (key, body, limits, log) → `fields` checks each field →
//! [`Engine::submit`] (429, 400) → the event stream becomes one JSON answer or chunks of `sse`. Dropping the connection
//! drops the event stream, which cancels.
//!
//! [`serve`] is all there is to call; [`HttpOptions`] says how.

#![forbid(unsafe_code)]

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use bcg_engine::{ClientId, Engine, GenerationRequest, Submission, SubmitError};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::answers::Answers;
use self::error::ApiError;
use self::metrics::HttpMetrics;
use self::options::Setup;

mod answers;
mod chat;
mod completions;
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
mod info;
mod listen;
mod metrics;
mod models;
mod options;
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

pub use error::HttpError;
pub use options::{ApiKey, HttpOptions};
pub use standby::stand_by;

/// What every route sees.
#[derive(Clone)]
pub(crate) struct App {
    engine: Arc<dyn Engine>,
    metrics: HttpMetrics,
    max_body_bytes: usize,
}

impl App {
    /// Submits `n` answers to each of these requests, all or none.
    async fn submit(&self, requests: Vec<GenerationRequest>, n: usize) -> Result<Answers, ApiError> {
        let cancelled = CancellationToken::new();
        // Dropped with this future, when the client leaves.
        let _cancels = cancelled.clone().drop_guard();
        let submission = Submission { requests, n, client: ClientId::default(), priority: 0, cancelled };
        let streams = self.with_engine(move |engine| engine.submit_all(submission)).await?;
        Ok(Answers::new(streams.into_iter().map(trace::watched).collect()))
    }

    /// Asks the engine off the async threads, because tokenizing a long text or compiling a grammar takes a while.
    async fn with_engine<T, F>(&self, ask: F) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Engine) -> Result<T, SubmitError> + Send + 'static,
    {
        let engine = self.engine.clone();
        let asked = tokio::task::spawn_blocking(move || ask(engine.as_ref())).await;
        asked.map_err(|error| ApiError::Engine(format!("asking the engine failed: {error}")))?.map_err(ApiError::from)
    }
}

/// Returns the router with every route of the server.
fn router(app: App, setup: Setup) -> Router {
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
        .route("/flush_cache", post(flush_cache::flush).get(flush_cache::flush))
        .route("/metrics", get(metrics::metrics))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed);
    front_door::guard(routes, &app, setup).with_state(app)
}

/// Serves until `shutdown` resolves, then finishes what runs, or gives up on it at the deadline.
///
/// # Errors
/// [`HttpError`] as [`HttpOptions::check`], before anything is served.
pub async fn serve(
    engine: Arc<dyn Engine>,
    listener: TcpListener,
    options: &HttpOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), HttpError> {
    let setup = Setup::new(options)?;
    let (tracer, deadline) = (setup.tracer.clone(), options.shutdown_deadline);
    let app = App { engine: engine.clone(), metrics: HttpMetrics::default(), max_body_bytes: options.max_body_bytes };
    let (began, mut begins) = tokio::sync::watch::channel(false);
    let signal = async move {
        shutdown.await;
        engine.drain();
        tracing::info!("shutting down: no new requests, running ones finish");
        let _ = began.send(true);
    };
    let deadline = async move {
        // A dropped sender means that serving ended on its own; then there is no deadline.
        if begins.wait_for(|began| *began).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(deadline).await;
    };
    tokio::select! {
        () = listen::run(listener, app, setup, signal) => {}
        () = deadline => tracing::warn!("shutdown deadline passed: running requests are cut off"),
    }
    if let Some(tracer) = tracer {
        tracer.shutdown().await;
    }
    Ok(())
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::UnknownRoute(method, uri.path().to_owned())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed(method, uri.path().to_owned())
}
