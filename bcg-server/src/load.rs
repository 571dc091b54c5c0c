//! `GET /get_load`: how busy the server is, as SGLang says it. Its gateway asks for it to choose the less loaded of two
//! workers.

use axum::Json;
use axum::extract::State;
use bcg_engine::Metrics;
use serde_json::{Value, json};

use crate::App;

/// The load, as a list with an entry for each replica.
pub(crate) async fn load(State(app): State<App>) -> Json<Value> {
    let page_size = app.engine.server_info().pointer("/settings/page_size").and_then(Value::as_i64).unwrap_or(0);
    Json((0..).zip(app.engine.replica_metrics()).map(|(rank, metrics)| load_json(rank, metrics, page_size)).collect())
}

/// Answers that run or wait, and the tokens of the KV pages that the running ones hold. A prompt that waits has no pages.
fn load_json(rank: usize, metrics: &Metrics, page_size: i64) -> Value {
    let waiting = metrics.queued_answers.get();
    json!({
        "dp_rank": rank,
        "num_reqs": metrics.running.get() + waiting,
        "num_waiting_reqs": waiting,
        "num_tokens": metrics.kv_pages_used.get() * page_size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_counts_what_runs_and_what_waits() {
        let metrics = Metrics::default();
        metrics.running.set(3);
        metrics.queued_answers.set(2);
        metrics.kv_pages_used.set(7);
        let expected = json!({"dp_rank": 1, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 112});
        assert_eq!(load_json(1, &metrics, 16), expected);
    }
}
