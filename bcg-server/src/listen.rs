//! Connections: how many there are, how long a request's head may take, TLS, and the end of all of them.
//!
//! Clients share the connections fairly. A connection beyond the limit, or beyond its client's share, is answered 503 without looking at the request, within a fraction of a second and in a
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
use bcg_engine::{ClientId, FairPlaces};
use http_body_util::{BodyExt, Limited};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::client::{self, Peer};
use crate::error::ApiError;
use crate::metrics::HttpMetrics;
use crate::options::Setup;
use crate::tls::Acceptor;
use crate::write_timeout::WriteTimeout;

/// Connections that are told at once that there are too many.
const REFUSALS_MAX: usize = 128;
/// How long telling it may take.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
/// How long a refused request is read before it is answered: a client that still writes might miss the answer.
const REFUSAL_READ: Duration = Duration::from_millis(20);
/// How much of it is read.
const REFUSAL_BYTES: usize = 1 << 20;

/// What a connection may hold of a request that is read ahead, and of an answer that is not yet taken, each.
const BUFFER_BYTES: usize = 64 << 10;
/// Connections of operators at once.
const OPERATORS_MAX: usize = 32;

/// What every connection of one port needs.
pub(crate) struct Server {
    routes: Router,
    metrics: HttpMetrics,
    http: http1::Builder,
    tls: Option<Acceptor>,
    max_connections: usize,
    read_timeout: Duration,
    write_timeout: Duration,
}

impl Server {
    /// Serves routes with the limits, and the certificate, of the public port.
    pub(crate) fn public(routes: Router, metrics: HttpMetrics, setup: &Setup) -> Self {
        let (max_connections, tls) = (setup.options.max_connections, setup.tls.clone());
        Self { max_connections, tls, ..Self::operators(routes, metrics, setup) }
    }

    /// Serves routes over plain HTTP with limits of its own.
    pub(crate) fn operators(routes: Router, metrics: HttpMetrics, setup: &Setup) -> Self {
        let (read_timeout, write_timeout) = (setup.options.request_read_timeout, setup.options.response_write_timeout);
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(read_timeout).max_buf_size(BUFFER_BYTES);
        Self { routes, metrics, http, tls: None, max_connections: OPERATORS_MAX, read_timeout, write_timeout }
    }

    /// Accepts until `end` resolves, then returns once the requests on their way are answered.
    pub(crate) async fn run(self, listener: TcpListener, end: impl Future<Output = ()>) {
        let server = Arc::new(self);
        let places = FairPlaces::new(server.max_connections);
        let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
        let connections = GracefulShutdown::new();
        let mut end = pin!(end);
        loop {
            let (stream, client) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => (stream, client::of_peer(peer.ip())),
                    Err(error) => {
                        pause_after(&error).await;
                        continue;
                    }
                },
                () = &mut end => break,
            };
            let (server, watcher) = (Arc::clone(&server), connections.watcher());
            if let Some(place) = places.try_take(&client, 1) {
                tokio::spawn(async move {
                    server.serve(stream, client, watcher).await;
                    drop(place);
                });
            } else if let Ok(permit) = Arc::clone(&refusals).try_acquire_owned() {
                tokio::spawn(async move {
                    server.refuse(stream).await;
                    drop(permit);
                });
            }
        }
        drop(listener);
        connections.shutdown().await;
    }
}

/// A connection that broke before it was accepted is none; anything else (too many open files) may pass.
pub(crate) async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::error!(%error, "connections cannot be accepted; trying again in a second");
        sleep(Duration::from_secs(1)).await;
    }
}

/// Answers the first request of a connection, whatever it is, and closes the connection. `respond` gets the path.
pub(crate) async fn answer_once(
    http: &http1::Builder,
    tls: Option<&Acceptor>,
    stream: TcpStream,
    respond: impl Fn(&str) -> Response,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let respond = &respond;
        async move {
            let (head, body) = request.into_parts();
            let _ = timeout(REFUSAL_READ, Limited::new(body, REFUSAL_BYTES).collect()).await;
            Ok::<_, Infallible>(respond(head.uri.path()))
        }
    });
    let mut http = http.clone();
    http.keep_alive(false);
    match tls {
        None => drop(http.serve_connection(TokioIo::new(stream), service).await),
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                drop(http.serve_connection(TokioIo::new(stream), service).await);
            }
        }
    }
}

impl Server {
    async fn serve(&self, stream: TcpStream, client: ClientId, watcher: Watcher) {
        // Answers are streams of small frames.
        let _ = stream.set_nodelay(true);
        let stream = WriteTimeout::new(stream, self.write_timeout);
        let routes = TowerToHyperService::new(self.routes.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(client.clone()));
            routes.call(request)
        });
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
        let refused = answer_once(&self.http, self.tls.as_ref(), stream, |_| self.refusal());
        // Whether the client heard it changes nothing.
        let _ = timeout(REFUSAL_TIME, refused).await;
    }

    fn refusal(&self) -> Response {
        let error = ApiError::TooManyConnections { max_connections: self.max_connections };
        self.metrics.count("other", error.status().as_u16());
        let mut response = error.into_response();
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    }
}
