//! `GET /get_load`: how busy the server is, as SGLang says it. Its gateway asks for it to choose the less loaded of two
//! workers.

use axum::Json;
use axum::extract::State;
use bcg_engine::Metrics;
use serde_json::{Value, json};

use crate::App;

/// The load, as a list with one entry: whatever replicas or roles there are, they are one worker with one queue.
pub(crate) async fn load(State(app): State<App>) -> Json<Value> {
    let page_size = app.engine.server_info().pointer("/settings/page_size").and_then(Value::as_i64).unwrap_or(0);
    Json(json!([load_json(&app.engine.replica_metrics(), page_size)]))
}

/// Answers that run or wait, and the tokens of the KV pages that the running ones hold. A prompt that waits has no pages.
fn load_json(engines: &[&Metrics], page_size: i64) -> Value {
    let sum = |count: fn(&Metrics) -> i64| engines.iter().map(|metrics| count(metrics)).sum::<i64>();
    // The queue is that of all, and so is its gauge.
    let waiting = engines.first().map_or(0, |metrics| metrics.queued_answers.get());
    json!({
        "dp_rank": 0,
        "num_reqs": sum(|metrics| metrics.running.get()) + waiting,
        "num_waiting_reqs": waiting,
        "num_tokens": sum(|metrics| metrics.kv_pages_used.get()) * page_size,
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
        let beside = Metrics::default();
        beside.running.set(1);
        beside.queued_answers.set(2);
        let expected = json!({"dp_rank": 0, "num_reqs": 6, "num_waiting_reqs": 2, "num_tokens": 112});
        assert_eq!(load_json(&[&metrics, &beside], 16), expected);
    }
}
