//! What a graph runs in order: segments, and the breaks between them.

use std::sync::Arc;

use crate::arena::{Arena, Claim};
use crate::break_site::BreakSite;
use crate::frozen::FrozenTensor;
use crate::segment::Segment;
use crate::{Eager, Result};

/// The body of a break with its frozen arguments and outputs.
pub(crate) type BreakFn<L> = Box<dyn Fn(&mut Eager<'_, L>, &Arena) -> Result<()> + Send + Sync>;

/// One eager break of a captured graph.
pub(crate) struct Break<L> {
    pub(crate) site: &'static BreakSite,
    pub(crate) run: BreakFn<L>,
    /// The allocations that the body made at capture.
    pub(crate) claims: Arc<[Claim]>,
    pub(crate) args: Vec<FrozenTensor>,
    pub(crate) outputs: Vec<FrozenTensor>,
    /// Launches of the body at capture.
    pub(crate) launches: usize,
    /// Why its work cannot become nodes of a merged executable, if so.
    pub(crate) not_healable: Option<&'static str>,
}

/// One step of a graph.
pub(crate) enum Step<L> {
    Segment(Arc<Segment>),
    Break(Break<L>),
}
