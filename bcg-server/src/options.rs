//! How the HTTP layer is set up, and the checked form of it.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use std::{fmt, io};

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use bcg_engine::OptionError;
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::error::{ApiError, HttpError};
use crate::front_door::REQUEST_ID;
use crate::tls::{self, Acceptor};
use crate::trace::{self, Tracer};

/// How the HTTP layer is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HttpOptions {
    /// What clients must show, one of them, on every route but `/health` and `/metrics`; without any, everybody is let in.
    /// Each key is a client of its own.
    pub api_key: Vec<ApiKey>,
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
    /// Bytes of all request bodies that are read or held at once, beyond the first 64 KiB of each (HTTP 429 above it).
    pub max_inflight_body_bytes: usize,
    /// How long a client may take no byte of what it is sent, before its connection is closed and its request cancelled.
    pub response_write_timeout: Duration,
    /// How long the server goes on to answer probes once a shutdown began, even if nothing runs.
    pub shutdown_grace: Duration,
    /// How long running requests may take once a shutdown began.
    pub shutdown_deadline: Duration,
    /// The OpenTelemetry collector that gets a span of each request (OTLP over HTTP).
    pub otlp_endpoint: Option<String>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            api_key: Vec::new(),
            cors_allow_origin: Vec::new(),
            tls_cert: None,
            tls_key: None,
            // With those that are turned away and the engine's own files it stays below 1024, the usual limit of open files.
            max_connections: 768,
            request_read_timeout: Duration::from_secs(30),
            max_body_bytes: 8 << 20,
            max_inflight_body_bytes: 64 << 20,
            response_write_timeout: Duration::from_secs(60),
            shutdown_grace: Duration::from_secs(1),
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
        if self.response_write_timeout.is_zero() {
            return Err(OptionError::new("response_write_timeout", "is 0", "give at least 1 second").into());
        }
        for (option, time) in [
            ("request_read_timeout", self.request_read_timeout),
            ("response_write_timeout", self.response_write_timeout),
            ("shutdown_deadline", self.shutdown_deadline),
            ("shutdown_grace", self.shutdown_grace),
        ] {
            OptionError::seconds(option, time)?;
        }
        if self.max_inflight_body_bytes < self.max_body_bytes {
            let (all, one) = (self.max_inflight_body_bytes, self.max_body_bytes);
            let problem = format!("{all} is less than one body may have, which is {one}");
            let remedy = "raise it, or lower `max_body_bytes`";
            return Err(OptionError::new("max_inflight_body_bytes", problem, remedy).into());
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
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',') {
            return Err(io::Error::other("a key is one word of visible ASCII characters, without commas"));
        }
        Ok(Self(key.to_owned()))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(***)")
    }
}

/// Finds the key that a request shows and returns its place. The time that it takes says nothing of the keys but their
/// number and lengths.
///
/// # Errors
/// [`ApiError::Unauthorized`] without one of the keys.
pub(crate) fn shown_key(keys: &[ApiKey], headers: &HeaderMap) -> Result<usize, ApiError> {
    let Some(shown) = headers.get(header::AUTHORIZATION) else {
        return Err(ApiError::Unauthorized("You did not provide an API key; send `Authorization: Bearer KEY`."));
    };
    let shown = shown.as_bytes();
    let is_bearer = shown.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"bearer "));
    let word = if is_bearer { shown[7..].trim_ascii() } else { &[] };
    // No key is empty. All are compared, whichever is shown.
    let mut place = u64::MAX;
    for (index, key) in (0..).zip(keys) {
        place.conditional_assign(&index, word.ct_eq(key.0.as_bytes()));
    }
    usize::try_from(place)
        .ok()
        .filter(|&place| place < keys.len())
        .ok_or(ApiError::Unauthorized("Incorrect API key provided."))
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
        let keys: Vec<ApiKey> = ["secret", "other"].map(|key| key.parse().expect("a key")).into();
        let check = |value: &'static str| {
            shown_key(&keys, &HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static(value))]))
        };
        for good in ["Bearer secret", "bearer secret", "Bearer  secret "] {
            assert_eq!(check(good), Ok(0), "{good}");
        }
        assert_eq!(check("Bearer other"), Ok(1));
        for bad in
            ["secret", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Basic secret", "Bearer secret,other", ""]
        {
            assert!(matches!(check(bad), Err(ApiError::Unauthorized(_))), "{bad}");
        }
        assert!(matches!(shown_key(&keys, &HeaderMap::new()), Err(ApiError::Unauthorized(_))));
        assert!(!format!("{keys:?}").contains("secret"));
        for bad in ["", "a b", "a,b", "é"] {
            assert!(bad.parse::<ApiKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn one_body_fits_into_the_bytes_of_all() {
        let mut options = HttpOptions { max_inflight_body_bytes: 10, max_body_bytes: 10, ..HttpOptions::default() };
        options.check().expect("one body at a time");
        options.max_inflight_body_bytes = 9;
        let error = options.check().expect_err("no body fits").to_string();
        assert!(error.contains("`max_inflight_body_bytes`") && error.contains("`max_body_bytes`"), "{error}");
    }
}
