//! Connections: how many there are, how long a request's head may take, TLS, and the end of all of them.
//!
//! A connection beyond the limit is answered 503 without looking at the request, within a fraction of a second and in a
//! small number at once; beyond that number it is closed. So an overload costs next to nothing and is told at once.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, Limited};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::error::ApiError;
use crate::metrics::HttpMetrics;
use crate::options::Setup;
use crate::tls::Acceptor;
use crate::{App, router};

/// Connections that are told at once that there are too many.
const REFUSALS_MAX: usize = 128;
/// How long telling it may take.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
/// How long a refused request is read before it is answered: a client that still writes might miss the answer.
const REFUSAL_READ: Duration = Duration::from_millis(20);
/// How much of it is read.
const REFUSAL_BYTES: usize = 1 << 20;

/// What every connection needs.
struct Server {
    routes: Router,
    metrics: HttpMetrics,
    http: http1::Builder,
    tls: Option<Acceptor>,
    max_connections: usize,
    read_timeout: Duration,
}

/// Accepts until `shutdown` resolves, then returns once the requests on their way are answered.
pub(crate) async fn run(listener: TcpListener, app: App, setup: Setup, shutdown: impl Future<Output = ()>) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(setup.options.request_read_timeout);
    let (max_connections, read_timeout) = (setup.options.max_connections, setup.options.request_read_timeout);
    let server = Arc::new(Server {
        metrics: app.metrics.clone(),
        http,
        tls: setup.tls.clone(),
        max_connections,
        read_timeout,
        routes: router(app, setup),
    });
    let (room, refusals) = (Arc::new(Semaphore::new(max_connections)), Arc::new(Semaphore::new(REFUSALS_MAX)));
    let connections = GracefulShutdown::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    pause_after(&error).await;
                    continue;
                }
            },
            () = &mut shutdown => break,
        };
        let (server, watcher) = (Arc::clone(&server), connections.watcher());
        if let Ok(permit) = Arc::clone(&room).try_acquire_owned() {
            tokio::spawn(async move {
                server.serve(stream, watcher).await;
                drop(permit);
            });
        } else if let Ok(permit) = Arc::clone(&refusals).try_acquire_owned() {
            tokio::spawn(async move {
                // Whether the client heard it changes nothing.
                let _ = timeout(REFUSAL_TIME, server.refuse(stream)).await;
                drop(permit);
            });
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// A connection that broke before it was accepted is none; anything else (too many open files) may pass.
pub(crate) async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::error!(%error, "connections cannot be accepted; trying again in a second");
        sleep(Duration::from_secs(1)).await;
    }
}

impl Server {
    async fn serve(&self, stream: TcpStream, watcher: Watcher) {
        // Answers are streams of small frames.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(self.routes.clone());
        let ended = match &self.tls {
            None => watcher.watch(self.http.serve_connection(TokioIo::new(stream), service)).await,
            Some(tls) => match timeout(self.read_timeout, tls.accept(stream)).await {
                Ok(Ok(stream)) => watcher.watch(self.http.serve_connection(TokioIo::new(stream), service)).await,
                Ok(Err(error)) => return tracing::debug!(%error, "no TLS connection"),
                Err(_) => return tracing::debug!("no TLS connection in time"),
            },
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection broke");
        }
    }

    async fn refuse(&self, stream: TcpStream) {
        let service = service_fn(|request: Request<Incoming>| async move {
            let body = Limited::new(request.into_body(), REFUSAL_BYTES);
            let _ = timeout(REFUSAL_READ, body.collect()).await;
            Ok::<_, Infallible>(self.refusal())
        });
        let mut http = self.http.clone();
        http.keep_alive(false);
        match &self.tls {
            None => drop(http.serve_connection(TokioIo::new(stream), service).await),
            Some(tls) => {
                if let Ok(stream) = tls.accept(stream).await {
                    drop(http.serve_connection(TokioIo::new(stream), service).await);
                }
            }
        }
    }

    fn refusal(&self) -> Response {
        let error = ApiError::TooManyConnections { max_connections: self.max_connections };
        self.metrics.count("other", error.status().as_u16());
        let mut response = error.into_response();
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    }
}
