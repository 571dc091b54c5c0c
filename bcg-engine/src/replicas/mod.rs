//! Several engines behind one front door: `--dp N`.
//!
//! Each replica is an engine of its own, with a model, a thread and devices of its own. [`Replicas`] turns the prompts of a
//! submission into tokens, once, and hands it to one replica (`router` has the rule); what comes back is that replica's
//! event stream itself, so nothing stands between a step and its reader. Limits of the queue hold for the server: replicas
//! share its places ([`Siblings`](crate::local::Siblings)).
//!
//! Invariants:
//! - a submission goes to one replica as a whole, and its load is counted until its last answer ends;
//! - a replica that cannot serve gets nothing while another one can; whoever it had ends there, each answer once;
//! - no thread of a replica is asked or waited for, and what the router remembers is bounded.

use std::hash::RandomState;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use self::router::{Asked, Load, Router, Standing};
use super::local::LocalEngine;
use super::metrics::Metrics;
use super::worker::EngineEnd;
use super::{ClientId, Engine, EventStream, Health, ModelInfo, Prompt, Submission, SubmitError};

pub(crate) use self::router::Ticket;
pub use self::start::{start, start_with};

mod record;
mod router;
mod start;

/// Engines of one model that share what is asked. With a single one, this is that engine.
#[derive(Debug)]
pub struct Replicas<E> {
    engines: Vec<E>,
    router: Mutex<Router>,
    names: RandomState,
    loads: Vec<Arc<Load>>,
}

impl<E: Engine> Replicas<E> {
    /// Puts engines of one model behind one front door.
    ///
    /// # Panics
    /// If there is none.
    pub fn new(engines: Vec<E>) -> Self {
        assert!(!engines.is_empty(), "there is at least one replica");
        let caches: Vec<usize> = engines.iter().map(Engine::prefix_cache_tokens).collect();
        let (router, loads) = Router::new(&caches);
        Self { names: router.names(), router: Mutex::new(router), loads, engines }
    }

    /// Returns the engines, in order.
    pub fn engines(&self) -> &[E] {
        &self.engines
    }

    fn router(&self) -> MutexGuard<'_, Router> {
        // No call in here panics half way.
        self.router.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a submission whose prompts are token ids to one replica, and to another one if that has just ended.
    fn hand_over(&self, submission: &Submission) -> Result<Vec<EventStream>, SubmitError> {
        let asked: Vec<Asked> = submission.requests.iter().map(|one| Asked::new(&self.names, one)).collect();
        let standing = |engine: &E| match engine.health() {
            Health::Failed(_) => Standing::Ill,
            Health::Ready | Health::Draining | Health::Degraded(_) => Standing::Serves,
        };
        let mut standings: Vec<Standing> = self.engines.iter().map(standing).collect();
        let mut refused = SubmitError::Stopped("no replica is left; see the server's log".into());
        loop {
            let routed = self.router().route(&asked, submission.n, &standings);
            let Some((index, tickets)) = routed else { return Err(refused) };
            match self.engines[index].submit_all(submission.clone()) {
                Ok(streams) => {
                    let mut tickets = tickets.into_iter();
                    return Ok(streams.into_iter().map(|stream| stream.holding(tickets.next())).collect());
                }
                Err(error @ SubmitError::Stopped(_)) => (standings[index], refused) = (Standing::Refused, error),
                Err(error) => return Err(error),
            }
        }
    }

    /// Turns what is no token ids yet into token ids, if there is room for the submission at all.
    fn tokenized(&self, mut submission: Submission) -> Result<Submission, SubmitError> {
        let num_answers = submission.requests.len().saturating_mul(submission.n);
        // Which replica is asked makes no difference: they share the queue and have one tokenizer.
        let first = &self.engines[0];
        first.has_room(&submission.client, num_answers)?;
        for request in &mut submission.requests {
            let prompt = std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new()));
            request.prompt = match prompt {
                Prompt::Tokens(tokens) => Prompt::Tokens(tokens),
                prompt => Prompt::Tokens(first.prompt_tokens(prompt)?),
            };
        }
        Ok(submission)
    }

    /// The replicas that cannot serve, and why, on one line; with how many there are.
    fn ill(&self) -> (usize, String) {
        let failed = self.engines.iter().enumerate().filter_map(|(index, engine)| match engine.health() {
            Health::Failed(why) => Some(format!("replica {index}: {why}")),
            Health::Ready | Health::Draining | Health::Degraded(_) => None,
        });
        let failed: Vec<String> = failed.collect();
        (failed.len(), failed.join("; "))
    }

    /// What an operator may want to know of each replica.
    fn described(&self) -> Vec<Value> {
        let describe = |(engine, load): (&E, &Arc<Load>)| {
            let (status, reason) = match engine.health() {
                Health::Ready => ("ready", None),
                Health::Draining => ("draining", None),
                Health::Degraded(why) => ("degraded", Some(why)),
                Health::Failed(why) => ("failed", Some(why)),
            };
            let devices = engine.server_info().pointer("/settings/devices").cloned();
            json!({
                "status": status,
                "reason": reason,
                "devices": devices,
                "answers": load.answers(),
                "load_tokens": load.tokens(),
            })
        };
        self.engines.iter().zip(&self.loads).map(describe).collect()
    }
}

impl Replicas<LocalEngine> {
    /// Resolves when no replica will ever serve again, though nobody stopped them, and says how they ended. For one waiter.
    pub async fn given_up(&self) -> EngineEnd {
        let (mut whys, mut is_stuck) = (Vec::new(), false);
        for (index, engine) in self.engines.iter().enumerate() {
            let end = engine.given_up().await;
            is_stuck |= matches!(end, EngineEnd::Stuck(_));
            let (EngineEnd::GaveUp(why) | EngineEnd::Stuck(why)) = end;
            whys.push(if self.engines.len() == 1 { why } else { format!("replica {index}: {why}") });
        }
        let why = whys.join("; ");
        if is_stuck { EngineEnd::Stuck(why) } else { EngineEnd::GaveUp(why) }
    }
}

impl<E: Engine> Engine for Replicas<E> {
    fn info(&self) -> &ModelInfo {
        self.engines[0].info()
    }

    fn submit_all(&self, submission: Submission) -> Result<Vec<EventStream>, SubmitError> {
        if let [only] = &self.engines[..] {
            return only.submit_all(submission);
        }
        let count = |error: &SubmitError| {
            // What is refused before a replica is chosen is counted for all.
            if let Some(metrics) = self.replica_metrics().first() {
                metrics.count_refused(error);
            }
        };
        self.hand_over(&self.tokenized(submission).inspect_err(count)?)
    }

    fn has_room(&self, client: &ClientId, num_answers: usize) -> Result<(), SubmitError> {
        self.engines[0].has_room(client, num_answers)
    }

    fn prefix_cache_tokens(&self) -> usize {
        self.engines.iter().map(Engine::prefix_cache_tokens).sum()
    }

    fn replicas(&self) -> Vec<&dyn Engine> {
        self.engines.iter().map(|engine| engine as &dyn Engine).collect()
    }

    /// Asks the first replica that can serve; [`replicas`](Engine::replicas) can be asked one by one.
    fn probe(&self) -> Result<EventStream, SubmitError> {
        let serves = |engine: &&E| !matches!(engine.health(), Health::Failed(_));
        self.engines.iter().find(serves).unwrap_or(&self.engines[0]).probe()
    }

    fn num_steps(&self) -> u64 {
        self.engines.iter().map(Engine::num_steps).sum()
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, SubmitError> {
        self.engines[0].encode(text, add_special_tokens)
    }

    fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> Result<String, SubmitError> {
        self.engines[0].decode(tokens, skip_special_tokens)
    }

    fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        self.engines[0].prompt_tokens(prompt)
    }

    fn flush_cache(&self) {
        self.engines.iter().for_each(Engine::flush_cache);
        self.router().forget();
    }

    fn server_info(&self) -> Value {
        let mut info = self.engines[0].server_info();
        info["dp_size"] = json!(self.engines.len());
        if self.engines.len() > 1 {
            info["replicas"] = Value::Array(self.described());
        }
        info
    }

    fn health(&self) -> Health {
        if let [only] = &self.engines[..] {
            return only.health();
        }
        let is_draining = |engine: &E| engine.health() == Health::Draining;
        match self.ill() {
            (num, ill) if num == self.engines.len() => Health::Failed(ill),
            _ if self.engines.iter().any(is_draining) => Health::Draining,
            (0, _) => Health::Ready,
            (_, ill) => Health::Degraded(ill),
        }
    }

    fn replica_metrics(&self) -> Vec<&Metrics> {
        self.engines.iter().flat_map(Engine::replica_metrics).collect()
    }

    fn drain(&self) {
        self.engines.iter().for_each(Engine::drain);
    }
}

#[cfg(test)]
mod tests;
