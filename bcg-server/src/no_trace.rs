//! What stands in for spans where the feature `otel` is off: options that ask for them are refused.

use std::future::Future;

use axum::extract::Request;
use bcg_engine::{EventStream, OptionError};

use crate::HttpError;

/// Returns the future as it is.
pub(crate) fn scope<F: Future>(_: Option<RequestSpan>, future: F) -> F {
    future
}

/// Returns the events as they are.
pub(crate) fn watched(events: EventStream) -> EventStream {
    events
}

/// Refuses every collector.
///
/// # Errors
/// [`OptionError`].
pub(crate) fn check(_: &str) -> Result<(), HttpError> {
    let remedy = "build it with its feature otel, or drop this option";
    Err(OptionError::new("otlp_endpoint", "this program was built without OpenTelemetry", remedy).into())
}

/// None is ever made.
#[derive(Clone)]
pub(crate) enum Tracer {}

impl Tracer {
    pub(crate) fn new(endpoint: &str) -> Result<Self, HttpError> {
        check(endpoint).map(|()| unreachable!("every collector is refused"))
    }

    pub(crate) fn begin(&self, _: &Request, _: &str, _: &str) -> RequestSpan {
        match *self {}
    }

    pub(crate) async fn shutdown(self) {
        match self {}
    }
}

/// None is ever made.
#[derive(Clone)]
pub(crate) enum RequestSpan {}

impl RequestSpan {
    pub(crate) fn end(&self, _: Option<u16>, _: bool) {
        match *self {}
    }
}
