//! Where nodes meet: each says a few bytes, and gets what all said.
//!
//! Node 0 gathers: the others send it what they say, and it sends them all of it. One meeting after the other; a node says
//! its part of the next one only when it has left the one before.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a node said, and what it came for.
#[derive(Clone, Debug)]
pub(super) struct Said {
    pub(super) purpose: String,
    pub(super) bytes: Vec<u8>,
}

/// The meetings, as one node sees them.
#[derive(Debug)]
pub(super) struct Exchange {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What each node has said, on node 0.
    said: Vec<Option<Said>>,
    /// What all said, until this node takes it.
    result: Option<Vec<Vec<u8>>>,
}

impl Exchange {
    pub(super) fn new(num_nodes: usize) -> Self {
        let state = State { said: vec![None; num_nodes], result: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a node says, on node 0. Returns what all said, once they have.
    ///
    /// # Errors
    /// The node that came for something else than node 0 or came twice, and what it did.
    pub(super) fn say(&self, node: usize, said: Said) -> Result<Option<Vec<Vec<u8>>>, (usize, String)> {
        let mut state = self.lock();
        if state.said[node].is_some() {
            return Err((node, format!("it came for `{}` before the meeting that it is in had ended", said.purpose)));
        }
        state.said[node] = Some(said);
        let Some(all) = state.said.iter().cloned().collect::<Option<Vec<Said>>>() else { return Ok(None) };
        state.said.fill(None);
        if let Some(other) = all.iter().position(|said| said.purpose != all[0].purpose) {
            return Err((other, format!("it came for `{}` and node 0 for `{}`", all[other].purpose, all[0].purpose)));
        }
        let all: Vec<Vec<u8>> = all.into_iter().map(|said| said.bytes).collect();
        state.result = Some(all.clone());
        self.changed.notify_all();
        Ok(Some(all))
    }

    /// Notes what all said, as node 0 told it.
    pub(super) fn end(&self, result: Vec<Vec<u8>>) {
        self.lock().result = Some(result);
        self.changed.notify_all();
    }

    /// Wakes who waits, to see that the world is lost.
    pub(super) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Waits for what all said, until `is_over`.
    ///
    /// # Errors
    /// After `timeout`, the first node that did not come; node 0 if that is not known here. `None` where `is_over`.
    pub(super) fn wait(&self, timeout: Duration, is_over: impl Fn() -> bool) -> Result<Vec<Vec<u8>>, Option<usize>> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(result) = state.result.take() {
                return Ok(result);
            }
            if is_over() {
                return Err(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let is_gathering = state.said.iter().any(Option::is_some);
                let missing = state.said.iter().position(Option::is_none).filter(|_| is_gathering);
                return Err(Some(missing.unwrap_or(0)));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
