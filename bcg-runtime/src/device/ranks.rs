//! What the ranks of a world share, whatever their devices: which of them was lost, if one was.

use std::sync::OnceLock;

use crate::Error;

/// The rank that ended its world, and why. Set once; the first word counts (law L5).
#[derive(Debug, Default)]
pub(crate) struct Lost(OnceLock<LostRank>);

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
    /// Says that a rank is lost, unless one is already, and returns the error that every rank gets.
    pub(crate) fn set(&self, lost: LostRank) -> Error {
        self.0.get_or_init(|| lost).error()
    }

    /// Returns the error that every rank gets, once a rank is lost.
    pub(crate) fn error(&self) -> Option<Error> {
        self.0.get().map(LostRank::error)
    }

    pub(crate) fn check(&self) -> crate::Result<()> {
        self.error().map_or(Ok(()), Err)
    }
}

impl LostRank {
    fn error(&self) -> Error {
        let Self { rank, collective, segment, cause } = self.clone();
        Error::RankLost { rank, collective, segment, cause }
    }
}
