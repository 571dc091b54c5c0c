//! The HTTP client of this crate: a pool of connections, over TLS where the URL says https.
//!
//! The load generator sends through it. Certificates are checked against the roots that the system trusts;
//! `SSL_CERT_FILE` names others.

use anyhow::{Context, bail};
use axum::body::Bytes;
use axum::http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Sends requests, and keeps connections for the next ones. Clones share the connections.
#[derive(Debug, Clone)]
pub(crate) struct HttpClient(Client<HttpsConnector<HttpConnector>, Full<Bytes>>);

impl HttpClient {
    /// Makes a client for one server; the system's root certificates are only read if its URL says https.
    ///
    /// # Errors
    /// If the URL is neither http nor https, or the system has no root certificates.
    pub(crate) fn new(url: &Uri) -> anyhow::Result<Self> {
        let builder = HttpsConnectorBuilder::new();
        let builder = match url.scheme_str() {
            Some("http") => {
                let config = ClientConfig::builder().with_root_certificates(RootCertStore::empty());
                builder.with_tls_config(config.with_no_client_auth())
            }
            Some("https") => {
                builder.with_native_roots().context("no root certificates to check servers with; set SSL_CERT_FILE")?
            }
            _ => bail!("`{url}` is no http:// or https:// URL"),
        };
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.enforce_http(false);
        let connector = builder.https_or_http().enable_http1().wrap_connector(connector);
        Ok(Self(Client::builder(TokioExecutor::new()).build(connector)))
    }

    /// Sends a request and returns once the answer's head is there.
    ///
    /// # Errors
    /// What broke on the way; an error status is none.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Error> {
        self.0.request(request).await
    }
}
