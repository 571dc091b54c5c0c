//! `POST /flush_cache` and `GET /flush_cache`, as SGLang has them.

use axum::extract::State;

use super::App;

/// Drops what the prefix cache holds and no request uses.
pub(super) async fn flush(State(app): State<App>) -> &'static str {
    app.engine.flush_cache();
    "Cache flushed.\n"
}
