//! The HTTP client that sends spans: a pool of connections, over TLS where the URL says https and the feature `tls` is on.
//!
//! Certificates are checked against the roots that the system trusts; `SSL_CERT_FILE` names others.

use axum::body::Bytes;
use axum::http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;

use crate::error::BoxError;

#[cfg(feature = "tls")]
type Connector = hyper_rustls::HttpsConnector<HttpConnector>;
#[cfg(not(feature = "tls"))]
type Connector = HttpConnector;

/// Sends requests, and keeps connections for the next ones. Clones share the connections.
#[derive(Debug, Clone)]
pub(crate) struct HttpClient(Client<Connector, Full<Bytes>>);

impl HttpClient {
    /// Makes a client for one server; the system's root certificates are only read if its URL says https.
    ///
    /// # Errors
    /// If the URL is neither http nor https, or the system has no root certificates.
    pub(crate) fn new(url: &Uri) -> Result<Self, BoxError> {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        Ok(Self(Client::builder(TokioExecutor::new()).build(connector(url, http)?)))
    }

    /// Sends a request and returns once the answer's head is there.
    ///
    /// # Errors
    /// What broke on the way; an error status is none.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Error> {
        self.0.request(request).await
    }
}

#[cfg(feature = "tls")]
fn connector(url: &Uri, mut http: HttpConnector) -> Result<Connector, BoxError> {
    use hyper_rustls::HttpsConnectorBuilder;
    use tokio_rustls::rustls::{ClientConfig, RootCertStore};

    let builder = HttpsConnectorBuilder::new();
    let builder = match url.scheme_str() {
        Some("http") => {
            let config = ClientConfig::builder().with_root_certificates(RootCertStore::empty());
            builder.with_tls_config(config.with_no_client_auth())
        }
        Some("https") => builder
            .with_native_roots()
            .map_err(|error| format!("no root certificates to check servers with; set SSL_CERT_FILE: {error}"))?,
        _ => return Err(format!("`{url}` is no http:// or https:// URL").into()),
    };
    http.enforce_http(false);
    Ok(builder.https_or_http().enable_http1().wrap_connector(http))
}

#[cfg(not(feature = "tls"))]
fn connector(url: &Uri, http: HttpConnector) -> Result<Connector, BoxError> {
    match url.scheme_str() {
        Some("http") => Ok(http),
        _ => Err(format!("`{url}` is no http:// URL, and this program was built without TLS").into()),
    }
}
