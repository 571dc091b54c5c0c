//! What the ranks of a world share, whatever their devices: which of them was lost, if one was.

use std::fmt;
use std::sync::OnceLock;

use crate::Error;

/// The rank that ended its world, and why. Set once; the first word counts (law L5).
#[derive(Default)]
pub(crate) struct Lost {
    rank: OnceLock<LostRank>,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Clone, Debug)]
pub(crate) struct LostRank {
    pub(crate) rank: usize,
    /// What the others waited for; empty if nobody waited.
    pub(crate) collective: String,
    /// The segment in which it stands, if it is captured.
    pub(crate) segment: Option<usize>,
    pub(crate) cause: String,
}

impl Lost {
    /// Says how threads are woken that wait for other ranks on the host, whoever says that one is lost. It is called
    /// while devices may be locked, so it locks none.
    pub(crate) fn wake_with(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.wake.get_or_init(|| Box::new(wake));
    }

    /// Says that a rank is lost, unless one is already, and returns the error that every rank gets.
    pub(crate) fn set(&self, lost: LostRank) -> Error {
        let error = self.rank.get_or_init(|| lost).error();
        if let Some(wake) = self.wake.get() {
            wake();
        }
        error
    }

    /// Returns the rank that is lost, if one is.
    pub(crate) fn rank(&self) -> Option<&LostRank> {
        self.rank.get()
    }

    /// Returns the error that every rank gets, once a rank is lost.
    pub(crate) fn error(&self) -> Option<Error> {
        self.rank.get().map(LostRank::error)
    }

    pub(crate) fn check(&self) -> crate::Result<()> {
        self.error().map_or(Ok(()), Err)
    }
}

impl fmt::Debug for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lost").field(&self.rank.get()).finish()
    }
}

impl LostRank {
    fn error(&self) -> Error {
        let Self { rank, collective, segment, cause } = self.clone();
        Error::RankLost { rank, collective, segment, cause }
    }
}
