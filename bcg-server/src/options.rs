//! How the HTTP layer is set up, and the checked form of it.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use std::{fmt, io};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use bcg_engine::OptionError;
use subtle::ConstantTimeEq;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::error::{ApiError, HttpError};
use crate::front_door::REQUEST_ID;
use crate::tls::{self, Acceptor};
use crate::trace::{self, Tracer};

/// How the HTTP layer is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HttpOptions {
    /// What clients must show on every route but `/health*` and `/metrics`; `None` lets everybody in.
    pub api_key: Option<ApiKey>,
    /// Origins whose web pages may use the server, as scheme and host with a port if it has one; `*` is any.
    pub cors_allow_origin: Vec<String>,
    /// The certificate chain for HTTPS (PEM, the server's own first); `None` serves HTTP.
    pub tls_cert: Option<PathBuf>,
    /// The private key of `tls_cert` (PEM).
    pub tls_key: Option<PathBuf>,
    /// The most connections at once; one more is turned away (HTTP 503).
    pub max_connections: usize,
    /// How long the head of a request may take, and then its body (HTTP 408); also how long a connection may idle.
    pub request_read_timeout: Duration,
    /// The largest request body in bytes (HTTP 413 above it).
    pub max_body_bytes: usize,
    /// How long running requests may take once a shutdown began.
    pub shutdown_deadline: Duration,
    /// The OpenTelemetry collector that gets a span of each request (OTLP over HTTP).
    pub otlp_endpoint: Option<String>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            api_key: None,
            cors_allow_origin: Vec::new(),
            tls_cert: None,
            tls_key: None,
            // With those that are turned away and the engine's own files it stays below 1024, the usual limit of open files.
            max_connections: 768,
            request_read_timeout: Duration::from_secs(30),
            max_body_bytes: 8 << 20,
            shutdown_deadline: Duration::from_secs(30),
            otlp_endpoint: None,
        }
    }
}

impl HttpOptions {
    /// Checks the options, and the files that they name.
    ///
    /// # Errors
    /// [`HttpError`] names the option, the problem and the remedy.
    pub fn check(&self) -> Result<(), HttpError> {
        if self.max_connections == 0 {
            return Err(OptionError::new("max_connections", "is 0", "give a number of at least 1").into());
        }
        if self.request_read_timeout.is_zero() {
            return Err(OptionError::new("request_read_timeout", "is 0", "give at least 1 second").into());
        }
        cors(&self.cors_allow_origin)?;
        tls::acceptor(self)?;
        self.otlp_endpoint.as_deref().map_or(Ok(()), trace::check)
    }
}

/// The checked form of [`HttpOptions`].
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) options: HttpOptions,
    pub(crate) cors: Option<CorsLayer>,
    pub(crate) tls: Option<Acceptor>,
    pub(crate) tracer: Option<Tracer>,
}

impl Setup {
    /// Makes what the options name. With `otlp_endpoint` it must be called in a tokio runtime, which then sends the spans.
    pub(crate) fn new(options: &HttpOptions) -> Result<Self, HttpError> {
        options.check()?;
        Ok(Self {
            cors: cors(&options.cors_allow_origin)?,
            tls: tls::acceptor(options)?,
            tracer: options.otlp_endpoint.as_deref().map(Tracer::new).transpose()?,
            options: options.clone(),
        })
    }
}

/// A secret that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl FromStr for ApiKey {
    type Err = io::Error;

    fn from_str(key: &str) -> io::Result<Self> {
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(io::Error::other("a key is one word of visible ASCII characters"));
        }
        Ok(Self(key.to_owned()))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(***)")
    }
}

impl ApiKey {
    /// Checks what a request shows, in a time that says nothing of the key but its length.
    ///
    /// # Errors
    /// [`ApiError::Unauthorized`] without the key.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(shown) = headers.get(header::AUTHORIZATION) else {
            return Err(ApiError::Unauthorized("You did not provide an API key; send `Authorization: Bearer KEY`."));
        };
        let shown = shown.as_bytes();
        let is_bearer = shown.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"bearer "));
        if is_bearer && bool::from(shown[7..].trim_ascii().ct_eq(self.0.as_bytes())) {
            return Ok(());
        }
        Err(ApiError::Unauthorized("Incorrect API key provided."))
    }
}

fn cors(origins: &[String]) -> Result<Option<CorsLayer>, HttpError> {
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().map(|origin| parse_origin(origin)).collect::<Result<Vec<_>, _>>()?)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([HeaderName::from_static(REQUEST_ID)]);
    Ok((!origins.is_empty()).then_some(layer))
}

/// Browsers send scheme, host and port, and compare letter by letter.
fn parse_origin(origin: &str) -> Result<HeaderValue, HttpError> {
    let host = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
    let is_origin = host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '?', '#', '*']));
    HeaderValue::from_str(origin).ok().filter(|_| is_origin).ok_or_else(|| {
        let remedy = "give a scheme and a host such as https://chat.example.com, or *";
        OptionError::new("cors_allow_origin", format!("`{origin}` is no origin"), remedy).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_checked_whole_and_never_printed() {
        let key: ApiKey = "secret".parse().expect("a key");
        let check = |value: &'static str| {
            key.check(&HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))]))
        };
        for good in ["Bearer secret", "bearer secret", "Bearer  secret "] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["secret", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Basic secret", ""] {
            assert!(matches!(check(bad), Err(ApiError::Unauthorized(_))), "{bad}");
        }
        assert!(matches!(key.check(&HeaderMap::new()), Err(ApiError::Unauthorized(_))));
        assert!(!format!("{key:?}").contains("secret"));
    }
}
