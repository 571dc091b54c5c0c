//! What the engine's handle knows of the answers that are not complete.
//!
//! An accepted request lives on the worker's thread. Where that thread hangs within a call nothing of it can be reached, so
//! the places that it holds in the queue, and an end of its events, stand here. With them its client hears that the engine
//! is stuck, and others get its places, while the thread may hang for ever.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::{Sender, WeakSender};

use super::super::{EngineEvent, Place, RequestError};

/// The places in the queue that a request holds until it begins to run.
#[derive(Debug)]
pub struct QueuePlaces {
    /// That of its submission, which is free once all its answers have begun. A probe has none.
    pub submission: Option<Arc<Place>>,
    /// Its own among the answers that may wait.
    pub answer: Place,
}

#[derive(Debug)]
struct Entry {
    events: WeakSender<EngineEvent>,
    /// `None` once it runs.
    places: Option<QueuePlaces>,
}

#[derive(Debug, Default)]
struct Entries {
    by_id: HashMap<u64, Entry>,
    next_id: u64,
}

/// The answers of an engine that are not complete, no more than wait and run. Clones are of the same engine.
#[derive(Debug, Clone, Default)]
pub struct OpenAnswers(Arc<Mutex<Entries>>);

impl OpenAnswers {
    /// Adds an answer whose events go to `events`.
    pub(crate) fn add(&self, events: &Sender<EngineEvent>, places: QueuePlaces) -> OpenAnswer {
        let mut entries = self.lock();
        let id = entries.next_id;
        entries.next_id += 1;
        entries.by_id.insert(id, Entry { events: events.downgrade(), places: Some(places) });
        OpenAnswer { all: self.clone(), id, waits: true }
    }

    /// Ends all of them with an error, and gives their places back.
    pub(crate) fn fail_all(&self, message: &str) {
        let entries = std::mem::take(&mut self.lock().by_id);
        for Entry { events, .. } in entries.into_values() {
            // Without a sender it is complete; a full channel cannot be, and a closed one is a client that left.
            if let Some(events) = events.upgrade() {
                let _ = events.try_send(EngineEvent::Failed(RequestError::Engine(message.to_owned())));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // No call in here panics half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An answer among those that are not complete; dropping it removes it.
#[derive(Debug)]
pub struct OpenAnswer {
    all: OpenAnswers,
    id: u64,
    waits: bool,
}

impl OpenAnswer {
    /// Whether it has not begun to run yet.
    pub(super) fn waits(&self) -> bool {
        self.waits
    }

    /// It begins to run, and gives its places back; `false` if it ran before.
    pub(super) fn begin(&mut self) -> bool {
        let begins = std::mem::take(&mut self.waits);
        if begins && let Some(entry) = self.all.lock().by_id.get_mut(&self.id) {
            entry.places = None;
        }
        begins
    }
}

impl Drop for OpenAnswer {
    fn drop(&mut self) {
        self.all.lock().by_id.remove(&self.id);
    }
}
