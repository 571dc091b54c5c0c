//! The fields by which a gateway joins a prefill worker and a decode worker for one request.
//!
//! SGLang's gateway in its prefill/decode mode (`--pd-disaggregation`) sends the same body to both: `bootstrap_host` and
//! `bootstrap_port` name the prefill worker's bootstrap service, `bootstrap_room` is a random number below 2⁶³ that names
//! the request on both sides. With several answers or prompts each of the three is a list. A server without a role would
//! compute the whole answer twice, so it refuses them.

use crate::error::ApiError;
use crate::fields::BodyFields;

/// The fields, as SGLang names them.
const FIELDS: [&str; 3] = ["bootstrap_room", "bootstrap_host", "bootstrap_port"];

/// What to do instead.
const REMEDY: &str = "it answers whole requests, also where its two roles of prefill and decode have a GPU each, so start the \
                      gateway without `--pd-disaggregation` and name this server in `--worker-urls`";

/// Refuses a request that is meant for a worker with a role.
///
/// # Errors
/// [`ApiError::InvalidRequest`] names the field and the remedy.
pub(crate) fn refuse(fields: &BodyFields) -> Result<(), ApiError> {
    FIELDS.iter().try_for_each(|name| fields.refuse(name, &[], REMEDY))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fields::leaked;

    #[test]
    fn a_request_for_a_worker_with_a_role_is_told_the_remedy() {
        for (body, name) in [
            (json!({"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}), "bootstrap_room"),
            (json!({"bootstrap_host": ["10.0.0.1", "10.0.0.1"]}), "bootstrap_host"),
            (json!({"bootstrap_port": [8998, null]}), "bootstrap_port"),
        ] {
            let error = refuse(&leaked(&body)).expect_err("no role");
            assert_eq!(error.status(), 400);
            let message = error.to_string();
            assert!(
                [name, "--worker-urls", "--pd-disaggregation"].iter().all(|part| message.contains(part)),
                "{message}"
            );
        }
    }

    #[test]
    fn absent_fields_ask_for_no_role() {
        let body = json!({"text": "a", "bootstrap_host": null, "bootstrap_port": null, "bootstrap_room": null});
        assert_eq!(refuse(&leaked(&body)), Ok(()));
    }
}
