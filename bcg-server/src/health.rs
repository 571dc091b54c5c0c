//! `GET /health` and `GET /health_generate`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bcg_engine::{Engine, EngineEvent, Health};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, WeakShared};
use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::App;

/// How long the engine may take for a token or a step before it counts as stuck.
const GENERATE_DEADLINE: Duration = Duration::from_secs(20);
/// How often the engine is asked whether it has finished a step meanwhile.
const STEPS_POLL: Duration = Duration::from_millis(5);

/// 200 while the engine serves, 503 with the reason otherwise.
pub(crate) async fn health(State(app): State<App>) -> Response {
    let (status, body) = match app.engine.health() {
        Health::Ready => (StatusCode::OK, json!({"status": "ready"})),
        Health::Draining => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "draining"})),
        Health::Failed(reason) => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "failed", "reason": reason})),
    };
    (status, Json(body)).into_response()
}

/// 200 if the engine finishes a step or generates a token in time, 503 with the reason otherwise.
pub(crate) async fn generate(State(app): State<App>) -> Response {
    match app.probes.outcome(&app.engine).await {
        Ok(()) => (StatusCode::OK, Json(json!({"status": "ready"}))).into_response(),
        Err(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "failed", "reason": *reason}))).into_response()
        }
    }
}

/// Why the engine does not work.
type Outcome = Result<(), Arc<str>>;

/// Asks the engine for a token, for one request or for all that wait at the same time.
#[derive(Clone, Default)]
pub(crate) struct Probes(Arc<Mutex<Option<WeakShared<BoxFuture<'static, Outcome>>>>>);

impl Probes {
    async fn outcome(&self, engine: &Arc<dyn Engine>) -> Outcome {
        let probe = {
            let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let running = latest.as_ref().and_then(WeakShared::upgrade).filter(|probe| probe.peek().is_none());
            running.unwrap_or_else(|| {
                let probe = probe(engine.clone()).boxed().shared();
                *latest = probe.downgrade();
                probe
            })
        };
        probe.await
    }
}

/// A busy engine may need longer for one more token than it needs for a step of what it has.
async fn probe(engine: Arc<dyn Engine>) -> Outcome {
    let before = engine.num_steps();
    let steps = async {
        while engine.num_steps() == before {
            sleep(STEPS_POLL).await;
        }
    };
    let works = async {
        tokio::select! {
            generated = generates(engine.clone()) => generated,
            () = steps => Ok(()),
        }
    };
    let late = || format!("no step and no token within {} seconds", GENERATE_DEADLINE.as_secs());
    timeout(GENERATE_DEADLINE, works).await.unwrap_or_else(|_| Err(late())).map_err(Arc::from)
}

async fn generates(engine: Arc<dyn Engine>) -> Result<(), String> {
    let asked = spawn_blocking(move || engine.probe()).await.map_err(|error| error.to_string())?;
    let mut events = asked.map_err(|error| error.to_string())?;
    while let Some(event) = events.next().await {
        if let EngineEvent::Failed(error) = event {
            return Err(error.to_string());
        }
    }
    Ok(())
}
