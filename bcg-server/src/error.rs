//! Typed rejections and their OpenAI error JSON; and what can be wrong with the options of the server.
//!
//! Every refusal that a client can meet is a variant here, with the status, `type`, `param` and `code` that OpenAI's
//! clients expect. Handlers return `Result<_, ApiError>`; nothing else turns errors into HTTP.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bcg_engine::{OptionError, RequestError, SubmitError};
use serde_json::{Value, json};

/// Any error.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Writes an error and its causes on one line.
pub(crate) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Why a server cannot serve as its options say. Names of options stand in backticks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// An option cannot work.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The value of an option cannot be used.
    #[error("`{option}` {value}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        source: BoxError,
    },
}

impl HttpError {
    /// Makes an [`HttpError::Value`].
    #[cfg(any(feature = "otel", feature = "tls"))]
    pub(crate) fn value(option: &'static str, value: String, source: BoxError) -> Self {
        Self::Value { option, value, source }
    }
}

/// Why a request was refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    /// A field is missing, has the wrong type, is out of range or is not supported.
    #[error("{message}")]
    InvalidRequest {
        /// What is wrong and what is accepted.
        message: String,
        /// The field to look at.
        param: Option<&'static str>,
    },
    /// Prompt and answer do not fit in the context.
    #[error("{message}")]
    ContextLength {
        /// Names the lengths.
        message: String,
    },
    /// The body names a model that is not served.
    #[error("The model `{0}` does not exist; this server serves `{1}`.")]
    ModelNotFound(String, String),
    /// No such route.
    #[error("Unknown request URL: {0} {1}.")]
    UnknownRoute(Method, String),
    /// The route exists for another method.
    #[error("Not allowed to {0} on {1}.")]
    MethodNotAllowed(Method, String),
    /// The request does not show the key of the server.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// The body did not arrive in time.
    #[error("The request did not arrive whole within {seconds} seconds.")]
    RequestTimeout {
        /// The limit in seconds.
        seconds: u64,
    },
    /// There are as many connections as there may be.
    #[error("The server has its {max_connections} connections; try again later.")]
    TooManyConnections {
        /// Connections at once.
        max_connections: usize,
    },
    /// The body is above the limit.
    #[error("The request body is larger than {limit} bytes.")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The bodies of requests that are held have as many bytes as they may have.
    #[error(
        "The bodies of requests under way have as many bytes as they may have ({limit}), or your share of them; try \
         again later."
    )]
    BodiesFull {
        /// The limit in bytes, over all bodies.
        limit: usize,
    },
    /// As many requests wait to be read as may.
    #[error("As many requests wait to be read as may ({limit}), or your share of them; try again later.")]
    Busy {
        /// Requests that may wait.
        limit: usize,
    },
    /// The queue is full.
    #[error("The server's queue of {max_queued_requests} requests is full; try again later.")]
    QueueFull {
        /// Requests that may wait.
        max_queued_requests: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// The compilers of grammars have as much to do as they may have.
    #[error("The server compiles as many formats of answers as it may; try again later.")]
    CompilersBusy,
    /// The request waited too long for its turn.
    #[error("The request waited {seconds} seconds in the queue; try again later.")]
    QueueTimeout {
        /// The limit in seconds.
        seconds: u64,
    },
    /// The client left before its request was accepted; nobody reads this answer.
    #[error("The client left.")]
    ClientLeft,
    /// There is no engine at the moment, and why.
    #[error("The server cannot answer now: {reason}; try again later.")]
    Unavailable {
        /// One sentence without a full stop.
        reason: String,
    },
    /// The server is shutting down.
    #[error("The server is shutting down.")]
    ShuttingDown,
    /// The engine failed while it worked on the request.
    #[error("{0}")]
    Engine(String),
}

impl ApiError {
    /// Makes an [`ApiError::InvalidRequest`] about one field.
    pub(crate) fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::InvalidRequest { message: message.into(), param: Some(param) }
    }

    /// Makes an [`ApiError::InvalidRequest`] about the body as a whole.
    pub(crate) fn bad_body(message: impl Into<String>) -> Self {
        Self::InvalidRequest { message: message.into(), param: None }
    }

    /// Returns the HTTP status.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::InvalidRequest { .. } | Self::ContextLength { .. } => StatusCode::BAD_REQUEST,
            Self::ModelNotFound(..) | Self::UnknownRoute(..) => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed(..) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Self::RequestTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::TooManyConnections { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::QueueFull { .. } | Self::CompilersBusy | Self::BodiesFull { .. } | Self::Busy { .. } => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::QueueTimeout { .. } | Self::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::ClientLeft => StatusCode::REQUEST_TIMEOUT,
            Self::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            Self::Engine(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Returns the error in OpenAI's shape.
    pub(crate) fn body(&self) -> Value {
        let (kind, param, code) = match self {
            Self::InvalidRequest { param, .. } => ("invalid_request_error", *param, None),
            Self::ContextLength { .. } => ("invalid_request_error", None, Some("context_length_exceeded")),
            Self::ModelNotFound(..) => ("invalid_request_error", Some("model"), Some("model_not_found")),
            Self::UnknownRoute(..) => ("invalid_request_error", None, Some("unknown_url")),
            Self::MethodNotAllowed(..) => ("invalid_request_error", None, Some("method_not_allowed")),
            Self::Unauthorized(_) => ("invalid_request_error", None, Some("invalid_api_key")),
            Self::RequestTimeout { .. } => ("invalid_request_error", None, Some("request_timeout")),
            Self::TooManyConnections { .. } => ("server_error", None, Some("too_many_connections")),
            Self::BodyTooLarge { .. } => ("invalid_request_error", None, Some("request_too_large")),
            Self::QueueFull { .. } => ("rate_limit_error", None, Some("queue_full")),
            Self::BodiesFull { .. } => ("rate_limit_error", None, Some("bodies_full")),
            Self::Busy { .. } => ("rate_limit_error", None, Some("server_busy")),
            Self::CompilersBusy => ("rate_limit_error", None, Some("compilers_busy")),
            Self::QueueTimeout { .. } => ("server_error", None, Some("queue_timeout")),
            Self::ClientLeft => ("invalid_request_error", None, Some("client_left")),
            Self::Unavailable { .. } => ("server_error", None, Some("unavailable")),
            Self::ShuttingDown => ("server_error", None, Some("shutting_down")),
            Self::Engine(_) => ("server_error", None, Some("engine_error")),
        };
        json!({"error": {"message": self.to_string(), "type": kind, "param": param, "code": code}})
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { max_queued_requests } => {
                Self::QueueFull { max_queued_requests, retry_after: Duration::from_secs(1) }
            }
            SubmitError::CompilersBusy => Self::CompilersBusy,
            SubmitError::Cancelled => Self::ClientLeft,
            SubmitError::ShuttingDown => Self::ShuttingDown,
            SubmitError::ContextLength { .. } | SubmitError::PromptTooLong { .. } => {
                Self::ContextLength { message: error.to_string() }
            }
            SubmitError::Prompt(message) => Self::bad_body(message),
            SubmitError::Stopped(message) => Self::Engine(message),
        }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Refused(message) => Self::bad_body(message),
            RequestError::QueueTimeout { seconds } => Self::QueueTimeout { seconds },
            RequestError::Engine(message) => Self::Engine(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        let (name, value) = match self {
            Self::QueueFull { retry_after, .. } => {
                (header::RETRY_AFTER, HeaderValue::from(retry_after.as_secs().max(1)))
            }
            Self::TooManyConnections { .. }
            | Self::CompilersBusy
            | Self::BodiesFull { .. }
            | Self::Busy { .. }
            | Self::QueueTimeout { .. }
            | Self::ShuttingDown => (header::RETRY_AFTER, HeaderValue::from(1)),
            Self::Unauthorized(_) => (header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            _ => return response,
        };
        response.headers_mut().insert(name, value);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_shape_that_openai_clients_read() {
        let error = ApiError::invalid("temperature", "temperature must be between 0 and 2");
        assert_eq!(error.status(), 400);
        let body = error.body();
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert_eq!(body["error"]["param"], "temperature");
        assert!(body["error"]["code"].is_null());
    }

    #[test]
    fn a_full_queue_says_when_to_retry() {
        let error: ApiError = SubmitError::QueueFull { max_queued_requests: 4 }.into();
        let response = error.into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }

    #[test]
    fn a_context_overflow_names_the_lengths() {
        let error: ApiError = SubmitError::ContextLength { prompt: 900, max_tokens: 200, context: 1024 }.into();
        let message = error.to_string();
        assert_eq!(error.status(), 400);
        for length in ["900", "200", "1024"] {
            assert!(message.contains(length), "{message}");
        }
    }
}
