//! A number of places that clients share fairly.
//!
//! A client may hold four times as many places as are still free. So a lone client can take four fifths of them, the
//! last fifth is there for others, and with many clients each gets about the same number. Nothing is divided beforehand,
//! and nothing has to be known of the clients. (Dynamic thresholds: Choudhury and Hahne, "Dynamic queue length thresholds
//! for shared-memory packet switches", 1998.)
//!
//! What a place is, is the caller's: a connection, a request that waits, a byte of a body.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ClientId;

/// How many times as many places a client may hold as are still free.
const HELD_PER_FREE: usize = 4;

/// Places that clients share. Clones share the same places.
#[derive(Debug, Clone)]
pub struct FairPlaces {
    total: usize,
    /// Places held, by client; a client that holds none has no entry.
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    by_client: HashMap<ClientId, usize>,
    sum: usize,
}

/// Places that a client holds; dropping it gives them back.
#[derive(Debug)]
pub struct Place {
    places: FairPlaces,
    client: ClientId,
    weight: usize,
}

impl FairPlaces {
    /// Makes `total` places, all of them free.
    pub fn new(total: usize) -> Self {
        Self { total, held: Arc::default() }
    }

    /// Takes `weight` places at once for a client, all or none.
    ///
    /// They are granted if they are free, and if one of these holds:
    /// - The client holds nothing yet. So nobody is kept out by the size of what they ask for.
    /// - Taken one by one, each of them finds that the client holds at most four times as many places as are free. So a
    ///   lone client can hold four fifths of the places, rounded up, and all of them if there are at most five.
    pub fn try_take(&self, client: &ClientId, weight: usize) -> Option<Place> {
        let mut held = self.lock();
        let is_first = !held.by_client.contains_key(client);
        held.take(self.total, client, weight, is_first).then(|| Place {
            places: self.clone(),
            client: client.clone(),
            weight,
        })
    }

    /// Returns how many places are held, by all clients together.
    pub fn taken(&self) -> usize {
        self.lock().sum
    }

    /// Returns how many places are free.
    pub fn free(&self) -> usize {
        self.total - self.taken()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // No call in here panics half way.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn take(&mut self, total: usize, client: &ClientId, weight: usize, is_first: bool) -> bool {
        let free = total - self.sum;
        if weight > free {
            return false;
        }
        let holds = self.by_client.get(client).copied().unwrap_or(0);
        // Of the last place that is taken: what the client holds before it, and what is free before it.
        let (before, free_before) = ((holds + weight).saturating_sub(1), (free - weight).saturating_add(1));
        let is_granted = weight == 0 || is_first || before <= free_before.saturating_mul(HELD_PER_FREE);
        if is_granted && weight > 0 {
            self.sum += weight;
            self.by_client.insert(client.clone(), holds + weight);
        }
        is_granted
    }

    fn give_back(&mut self, client: &ClientId, weight: usize) {
        self.sum -= weight;
        if let Some(holds) = self.by_client.get_mut(client) {
            *holds -= weight;
            if *holds == 0 {
                self.by_client.remove(client);
            }
        }
    }
}

impl Place {
    /// Takes `more` places beside these, by the rule of [`FairPlaces::try_take`], where a client that holds only these
    /// counts as one that holds nothing. If they are not granted, nothing changes.
    pub fn grow(&mut self, more: usize) -> bool {
        let mut held = self.places.lock();
        let is_first = held.by_client.get(&self.client).copied().unwrap_or(0) == self.weight;
        let is_granted = held.take(self.places.total, &self.client, more, is_first);
        drop(held);
        if is_granted {
            self.weight += more;
        }
        is_granted
    }

    /// Parts with `weight` of these places, which can be given back on their own then.
    ///
    /// # Panics
    /// If these are fewer.
    #[must_use]
    pub fn split(&mut self, weight: usize) -> Self {
        assert!(weight <= self.weight, "{} places cannot part with {weight}", self.weight);
        self.weight -= weight;
        Self { places: self.places.clone(), client: self.client.clone(), weight }
    }

    /// Returns how many places these are.
    pub fn weight(&self) -> usize {
        self.weight
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.weight > 0 {
            self.places.lock().give_back(&self.client, self.weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(name: &str) -> ClientId {
        ClientId::new(name)
    }

    /// Takes places one by one until one is refused.
    fn fill(places: &FairPlaces, name: &str) -> Vec<Place> {
        std::iter::from_fn(|| places.try_take(&client(name), 1)).collect()
    }

    #[test]
    fn a_lone_client_gets_four_fifths_and_small_totals_whole() {
        for (total, most) in [(0, 0), (1, 1), (2, 2), (5, 5), (6, 5), (10, 9), (768, 615)] {
            let places = FairPlaces::new(total);
            let held = fill(&places, "a");
            assert_eq!((held.len(), places.free()), (most, total - most), "of {total}");
            drop(held);
            assert_eq!((places.taken(), places.lock().by_client.len()), (0, 0));
        }
    }

    #[test]
    fn what_one_client_leaves_is_there_for_the_next() {
        let places = FairPlaces::new(768);
        let flood = fill(&places, "a");
        let second = fill(&places, "b");
        assert!(second.len() >= 100, "{}", second.len());
        let third = places.try_take(&client("c"), 1);
        assert!(third.is_some() && flood.len() > second.len());
    }

    #[test]
    fn many_at_once_are_as_many_one_by_one() {
        for weight in 1..=10 {
            let (whole, single) = (FairPlaces::new(10), FairPlaces::new(10));
            let (_one, _other) = (whole.try_take(&client("a"), 1), single.try_take(&client("a"), 1));
            let at_once = whole.try_take(&client("a"), weight).is_some();
            let one_by_one = fill(&single, "a").len() >= weight;
            assert_eq!(at_once, one_by_one, "{weight} after one");
        }
    }

    #[test]
    fn who_holds_nothing_is_refused_only_for_want_of_room() {
        let places = FairPlaces::new(10);
        let all = places.try_take(&client("a"), 10);
        assert!(all.is_some());
        assert!(places.try_take(&client("b"), 1).is_none() && places.try_take(&client("b"), 0).is_some());
        drop(all);
        assert!(places.try_take(&client("b"), 11).is_none());
        assert_eq!(places.free(), 10);
    }

    #[test]
    fn places_that_part_are_given_back_one_by_one() {
        let places = FairPlaces::new(10);
        let mut all = places.try_take(&client("a"), 6).expect("room");
        let part = all.split(2);
        assert_eq!((all.weight(), part.weight(), places.taken()), (4, 2, 6));
        drop(all);
        assert_eq!(places.taken(), 2);
        drop(part);
        assert_eq!(places.taken(), 0);
    }

    #[test]
    fn a_place_grows_by_the_same_rule() {
        let places = FairPlaces::new(10);
        let mut only = places.try_take(&client("a"), 0).expect("nothing costs nothing");
        assert!(only.grow(9) && only.weight() == 9 && !only.grow(2));
        assert!(only.grow(1), "a client's only place may take all");
        assert_eq!((only.weight(), places.free()), (10, 0));
        drop(only);
        let mut first = places.try_take(&client("a"), 1).expect("room");
        let second = places.try_take(&client("a"), 7).expect("room");
        assert!(first.grow(1) && !first.grow(1), "beside another place, the rule holds");
        assert_eq!(places.taken(), 9);
        drop((first, second));
        assert_eq!(places.taken(), 0);
    }
}
