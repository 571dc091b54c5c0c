//! Flags of the HTTP layer, and their checked form.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use anyhow::{Context, ensure};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use clap::Args;
use subtle::ConstantTimeEq;
use tokio_rustls::rustls::ServerConfig;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::front_door::REQUEST_ID;
use super::trace::Tracer;
use super::{ApiError, tls};

/// Connections at once, unless `--max-connections` says otherwise: with those that are turned away and the engine's own
/// files it stays below 1024, the usual limit of open files.
const MAX_CONNECTIONS: usize = 768;

/// Flags of the HTTP layer.
#[derive(Debug, Clone, Args)]
pub struct HttpArgs {
    /// Key that clients must send (Authorization: Bearer KEY) on every route but /health* and /metrics
    #[arg(long, value_name = "KEY", env = "BCG_API_KEY", hide_env_values = true)]
    pub api_key: Option<ApiKey>,

    /// Origin whose web pages may use the server, as SCHEME://HOST with a port if it has one, or * for any; repeatable
    #[arg(long, value_name = "ORIGIN")]
    pub cors_allow_origin: Vec<String>,

    /// Serve https with this certificate chain (PEM, the server's own first)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Connections at once; one more is turned away (HTTP 503)
    #[arg(long, value_name = "N", default_value_t = MAX_CONNECTIONS)]
    pub max_connections: usize,

    /// Seconds in which the head of a request must arrive, and then its body (HTTP 408); also how long a connection may
    /// idle between two requests
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub request_read_timeout: u64,

    /// Largest request body in bytes (HTTP 413 above it)
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
    pub max_body_bytes: usize,

    /// Seconds that running requests get to finish after SIGTERM or ctrl-c
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub shutdown_deadline: u64,

    /// Send a span of each request to this OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

impl HttpArgs {
    /// Checks the flags and reads the files that they name. With `--otlp-endpoint` it must be called in a tokio runtime,
    /// which then sends the spans.
    ///
    /// # Errors
    /// Names the flag, the problem and the remedy.
    pub fn options(&self) -> anyhow::Result<ApiOptions> {
        ensure!(self.max_connections > 0, "--max-connections: is 0; give a number of at least 1");
        ensure!(self.request_read_timeout > 0, "--request-read-timeout: is 0; give at least 1 second");
        let tls = match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => Some(tls::config(cert, key)?),
            _ => None,
        };
        Ok(ApiOptions {
            max_body_bytes: self.max_body_bytes,
            shutdown_deadline: Duration::from_secs(self.shutdown_deadline),
            max_connections: self.max_connections,
            request_read_timeout: Duration::from_secs(self.request_read_timeout),
            api_key: self.api_key.clone(),
            cors: cors(&self.cors_allow_origin)?,
            tls,
            tracer: self.otlp_endpoint.as_deref().map(Tracer::new).transpose()?,
        })
    }
}

/// How the HTTP layer is set up.
#[derive(Debug, Clone)]
pub struct ApiOptions {
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// How long running requests may take once a shutdown began.
    pub shutdown_deadline: Duration,
    /// Connections at once.
    pub max_connections: usize,
    /// How long the head of a request may take, and then its body.
    pub request_read_timeout: Duration,
    /// What clients must show.
    pub api_key: Option<ApiKey>,
    /// Which web pages may use the server; `None` is none.
    pub cors: Option<CorsLayer>,
    /// Serve https.
    pub tls: Option<Arc<ServerConfig>>,
    /// Where spans go.
    pub tracer: Option<Tracer>,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self {
            max_body_bytes: 8 << 20,
            shutdown_deadline: Duration::from_secs(30),
            max_connections: MAX_CONNECTIONS,
            request_read_timeout: Duration::from_secs(30),
            api_key: None,
            cors: None,
            tls: None,
            tracer: None,
        }
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
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
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

fn cors(origins: &[String]) -> anyhow::Result<Option<CorsLayer>> {
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().map(|origin| parse_origin(origin)).collect::<anyhow::Result<Vec<_>>>()?)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([HeaderName::from_static(REQUEST_ID)]);
    Ok((!origins.is_empty()).then_some(layer))
}

/// Browsers send scheme, host and port, and compare letter by letter.
fn parse_origin(origin: &str) -> anyhow::Result<HeaderValue> {
    let host = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
    let problem = || {
        format!(
            "--cors-allow-origin: `{origin}` is no origin; give a scheme and a host such as https://chat.example.com, or *"
        )
    };
    ensure!(host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '?', '#', '*'])), problem());
    HeaderValue::from_str(origin).with_context(problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::ServerArgs;
    use clap::Parser;

    fn parse(flags: &[&str]) -> Result<ServerArgs, clap::Error> {
        ServerArgs::try_parse_from(["bcg-server", "--model", "m"].iter().chain(flags))
    }

    #[test]
    fn defaults_are_the_same_with_and_without_flags() {
        let (parsed, default) = (parse(&[]).expect("parses").http.options().expect("works"), ApiOptions::default());
        assert_eq!(format!("{parsed:?}"), format!("{default:?}"));
    }

    #[test]
    fn flags_that_cannot_work_name_the_remedy() {
        for (flag, value, remedy) in [
            ("--max-connections", "0", "at least 1"),
            ("--request-read-timeout", "0", "at least 1 second"),
            ("--cors-allow-origin", "chat.example.com", "give a scheme and a host"),
            ("--cors-allow-origin", "https://chat.example.com/", "give a scheme and a host"),
            ("--otlp-endpoint", "127.0.0.1:4318", "http://"),
        ] {
            let error = format!("{:#}", parse(&[flag, value]).expect("parses").http.options().expect_err("refused"));
            assert!(error.starts_with(flag) && error.contains(remedy), "{error}");
        }
        for flags in [&["--tls-cert", "c.pem"], &["--tls-key", "k.pem"], &["--api-key", ""], &["--api-key", "a b"]] {
            parse(flags).expect_err("refused");
        }
    }

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
        assert!(!format!("{:?}", parse(&["--api-key", "secret"]).expect("parses")).contains("secret"));
    }
}
