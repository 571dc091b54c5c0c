//! HTTP: routes, limits and errors in OpenAI's shape. One route per file.
//!
//! Life of a request: `listen` (a connection) → `front_door` (key, body, limits, log) → [`fields`] checks each field →
//! [`Engine::submit`] (429, 400) → the event stream becomes one JSON answer or [`sse`] chunks. Dropping the connection
//! drops the event stream, which cancels.

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use tokio::net::TcpListener;

use crate::engine::{Engine, EventStream, GenerationRequest};
use crate::error::ApiError;

mod chat;
mod completions;
pub mod fields;
mod front_door;
mod health;
mod listen;
mod metrics;
mod models;
mod options;
mod request;
pub mod sse;
mod tls;
mod trace;

pub use options::{ApiKey, ApiOptions, HttpArgs};
pub use trace::Tracer;

/// What every route sees.
#[derive(Clone)]
pub(crate) struct App {
    engine: Arc<dyn Engine>,
    max_body_bytes: usize,
}

impl App {
    /// Submits off the async threads, because tokenizing a long prompt takes a while.
    async fn submit(&self, request: GenerationRequest) -> Result<EventStream, ApiError> {
        let engine = self.engine.clone();
        let submitted = tokio::task::spawn_blocking(move || engine.submit(request)).await;
        let submitted = submitted.map_err(|error| ApiError::Engine(format!("submitting failed: {error}")))?;
        Ok(trace::watched(submitted?))
    }
}

/// Returns the router with every route of the server.
pub fn router(engine: Arc<dyn Engine>, options: &ApiOptions) -> Router {
    let app = App { engine, max_body_bytes: options.max_body_bytes };
    let routes = Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{name}", get(models::retrieve))
        .route("/health", get(health::health))
        .route("/metrics", get(metrics::metrics))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed);
    front_door::guard(routes, &app, options).with_state(app)
}

/// Serves until `shutdown` resolves, then finishes what runs, or gives up on it at the deadline.
pub async fn serve(
    listener: TcpListener,
    engine: Arc<dyn Engine>,
    options: ApiOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let app = router(engine.clone(), &options);
    let (began, mut begins) = tokio::sync::watch::channel(false);
    let draining = engine.clone();
    let signal = async move {
        shutdown.await;
        draining.drain();
        tracing::info!("shutting down: no new requests, running ones finish");
        let _ = began.send(true);
    };
    let deadline = async move {
        // A dropped sender means that serving ended on its own; then there is no deadline.
        if begins.wait_for(|began| *began).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(options.shutdown_deadline).await;
    };
    tokio::select! {
        () = listen::run(listener, app, engine.clone(), &options, signal) => {}
        () = deadline => tracing::warn!("shutdown deadline passed: running requests are cut off"),
    }
    if let Some(tracer) = options.tracer {
        tracer.shutdown().await;
    }
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::UnknownRoute(method, uri.path().to_owned())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed(method, uri.path().to_owned())
}
