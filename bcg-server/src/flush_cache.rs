//! `POST /flush_cache` and `GET /flush_cache`, as SGLang has them.

use axum::extract::State;

use crate::App;

/// Drops what the prefix cache holds and no request uses.
pub(crate) async fn flush(State(app): State<App>) -> &'static str {
    app.engine.flush_cache();
    "Cache flushed.\n"
}
