//! `POST /v1/embeddings`, which this server refuses.

use crate::error::ApiError;

/// Says why there are no embeddings.
pub(crate) async fn refuse() -> ApiError {
    ApiError::bad_body(
        "`/v1/embeddings` is not supported: the served model writes text; ask a server of an embedding model.",
    )
}
