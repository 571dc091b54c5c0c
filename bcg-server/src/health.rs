//! `GET /health` and `GET /health_generate`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bcg_engine::{Engine, EngineEvent, Health};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, WeakShared, join_all};
use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::App;

/// How long the engine may take for a token or a step before it counts as stuck.
const GENERATE_DEADLINE: Duration = Duration::from_secs(20);
/// How often the engine is asked whether it has finished a step meanwhile.
const STEPS_POLL: Duration = Duration::from_millis(5);

/// 200 while the engine serves, also with some of its replicas only, 503 with the reason otherwise.
pub(crate) async fn health(State(app): State<App>) -> Response {
    let (status, body) = match app.engine.health() {
        Health::Ready => (StatusCode::OK, json!({"status": "ready"})),
        Health::Degraded(reason) => (StatusCode::OK, json!({"status": "degraded", "reason": reason})),
        Health::Draining => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "draining"})),
        Health::Failed(reason) => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "failed", "reason": reason})),
    };
    (status, Json(body)).into_response()
}

/// 200 if the engine, or one of its replicas, finishes a step or generates a token in time, 503 with the reason otherwise.
pub(crate) async fn generate(State(app): State<App>) -> Response {
    match app.probes.outcome(&app.engine).await {
        Ok(None) => (StatusCode::OK, Json(json!({"status": "ready"}))).into_response(),
        Ok(Some(ill)) => (StatusCode::OK, Json(json!({"status": "degraded", "reason": *ill}))).into_response(),
        Err(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "failed", "reason": *reason}))).into_response()
        }
    }
}

/// Why the engine does not work, or why some of its replicas do not.
type Outcome = Result<Option<Arc<str>>, Arc<str>>;

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

/// Asks each replica.
async fn probe(engine: Arc<dyn Engine>) -> Outcome {
    let num_replicas = engine.replicas().len();
    if num_replicas <= 1 {
        return Part { engine, replica: None }.works().await.map(|()| None).map_err(Arc::from);
    }
    let part = |index| Part { engine: engine.clone(), replica: Some(index) };
    let outcomes = join_all((0..num_replicas).map(|index| async move { part(index).works().await })).await;
    let ill = |(index, outcome): (usize, Result<(), String>)| Some(format!("replica {index}: {}", outcome.err()?));
    let ill: Vec<String> = outcomes.into_iter().enumerate().filter_map(ill).collect();
    match ill.len() {
        0 => Ok(None),
        num if num == num_replicas => Err(ill.join("; ").into()),
        _ => Ok(Some(ill.join("; ").into())),
    }
}

/// An engine, or one of its replicas.
#[derive(Clone)]
struct Part {
    engine: Arc<dyn Engine>,
    replica: Option<usize>,
}

impl Part {
    fn ask<T>(&self, ask: impl FnOnce(&dyn Engine) -> T) -> T {
        match self.replica.and_then(|index| self.engine.replicas().get(index).copied()) {
            Some(replica) => ask(replica),
            None => ask(&*self.engine),
        }
    }

    /// A busy engine may need longer for one more token than it needs for a step of what it has.
    async fn works(self) -> Result<(), String> {
        // Of several replicas an ill one is not waited for: what is asked of it meanwhile goes to the others.
        if self.replica.is_some()
            && let Health::Failed(reason) = self.ask(Engine::health)
        {
            return Err(reason);
        }
        let before = self.ask(Engine::num_steps);
        let steps = async {
            while self.ask(Engine::num_steps) == before {
                sleep(STEPS_POLL).await;
            }
        };
        let works = async {
            tokio::select! {
                generated = generates(self.clone()) => generated,
                () = steps => Ok(()),
            }
        };
        let late = || format!("no step and no token within {} seconds", GENERATE_DEADLINE.as_secs());
        timeout(GENERATE_DEADLINE, works).await.unwrap_or_else(|_| Err(late()))
    }
}

async fn generates(part: Part) -> Result<(), String> {
    let asked = spawn_blocking(move || part.ask(Engine::probe)).await.map_err(|error| error.to_string())?;
    let mut events = asked.map_err(|error| error.to_string())?;
    while let Some(event) = events.next().await {
        if let EngineEvent::Failed(error) = event {
            return Err(error.to_string());
        }
    }
    Ok(())
}
