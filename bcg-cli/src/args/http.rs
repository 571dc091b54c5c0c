//! Flags of the HTTP layer.

use std::path::PathBuf;
use std::time::Duration;

use bcg_server::{ApiKey, HttpOptions};
use clap::Args;

/// Flags of the HTTP layer.
#[derive(Debug, Clone, Args)]
pub struct HttpArgs {
    /// Key that clients must send (Authorization: Bearer KEY) on every route but /health and /metrics; repeatable, or
    /// separated by commas. Clients with different keys share the server fairly
    #[arg(long, value_name = "KEY", env = "BCG_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub api_key: Vec<ApiKey>,

    /// Origin whose web pages may use the server, as SCHEME://HOST with a port if it has one, or * for any; repeatable
    #[arg(long, value_name = "ORIGIN")]
    pub cors_allow_origin: Vec<String>,

    /// Serve https with this certificate chain (PEM, the server's own first)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Connections at once; one more is turned away (HTTP 503). One address may hold four times as many as are free
    #[arg(long, value_name = "N", default_value_t = HttpOptions::default().max_connections)]
    pub max_connections: usize,

    /// Seconds in which the head of a request must arrive, and then its body (HTTP 408); also how long a connection may
    /// idle between two requests
    #[arg(long, value_name = "SECONDS", default_value_t = HttpOptions::default().request_read_timeout.as_secs())]
    pub request_read_timeout: u64,

    /// Largest request body in bytes (HTTP 413 above it)
    #[arg(long, value_name = "BYTES", default_value_t = HttpOptions::default().max_body_bytes)]
    pub max_body_bytes: usize,

    /// Bytes of all request bodies at once, beyond the first 64 KiB of each (HTTP 429 above it). One client may hold four
    /// times as many as are free
    #[arg(long, value_name = "BYTES", default_value_t = HttpOptions::default().max_inflight_body_bytes)]
    pub max_inflight_body_bytes: usize,

    /// Seconds in which a client must take at least a byte of what it is sent; then its connection is closed
    #[arg(long, value_name = "SECONDS", default_value_t = HttpOptions::default().response_write_timeout.as_secs())]
    pub response_write_timeout: u64,

    /// Seconds for which the server answers probes after SIGTERM or ctrl-c, at least
    #[arg(long, value_name = "SECONDS", default_value_t = HttpOptions::default().shutdown_grace.as_secs())]
    pub shutdown_grace: u64,

    /// Seconds that running requests get to finish after SIGTERM or ctrl-c
    #[arg(long, value_name = "SECONDS", default_value_t = HttpOptions::default().shutdown_deadline.as_secs())]
    pub shutdown_deadline: u64,

    /// Send a span of each request to this OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

impl HttpArgs {
    /// Returns the options that the flags stand for.
    pub fn options(&self) -> HttpOptions {
        let mut options = HttpOptions::default();
        options.api_key = self.api_key.clone();
        options.cors_allow_origin = self.cors_allow_origin.clone();
        options.tls_cert = self.tls_cert.clone();
        options.tls_key = self.tls_key.clone();
        options.max_connections = self.max_connections;
        options.request_read_timeout = Duration::from_secs(self.request_read_timeout);
        options.max_body_bytes = self.max_body_bytes;
        options.max_inflight_body_bytes = self.max_inflight_body_bytes;
        options.response_write_timeout = Duration::from_secs(self.response_write_timeout);
        options.shutdown_grace = Duration::from_secs(self.shutdown_grace);
        options.shutdown_deadline = Duration::from_secs(self.shutdown_deadline);
        options.otlp_endpoint = self.otlp_endpoint.clone();
        options
    }
}
