//! One launch for all ranks: a merged executable that holds a chain of each rank's work (law L17).
//!
//! Rank threads run the bodies of their breaks side by side. The last of them to come patches what changed, of all ranks, and
//! launches once on rank 0's stream. That stream waits for what the other ranks' streams have before it, and they wait for
//! the launch, through events. Where the driver makes no such graph, each rank launches one of its own once all have come.

use std::sync::Arc;

use crate::device::traits::{NodeHandle, Part};
use crate::device::{Event, Graph, GraphExec, Stream};
use crate::stream::work_list::{Listed, Origin, Span};
use crate::world::Ranks;
use crate::{Error, Result};

/// An executable for one span of every rank.
#[derive(Debug)]
pub(super) struct WorldExec {
    exec: GraphExec,
    /// The graph that owns the nodes.
    _graph: Graph,
    /// The main streams of all ranks, in order.
    streams: Vec<Arc<Stream>>,
    /// Recorded on each rank's stream before a launch; the first is not used.
    ready: Vec<Event>,
    /// Recorded after a launch.
    done: Event,
}

/// What a rank has to launch.
pub(super) struct Request {
    /// The executable of all ranks that does its span, if there is one.
    pub(super) exec: Option<Arc<WorldExec>>,
    /// The nodes whose work differs from that of the last launch.
    pub(super) changes: Vec<(NodeHandle, Listed)>,
    /// Neither that nor an executable of its own does its span.
    pub(super) has_none: bool,
    /// It has no try left to make another one, or nothing to make one for.
    pub(super) is_spent: bool,
}

/// What all ranks do with their spans.
#[derive(Clone, Copy)]
pub(super) struct Outcome {
    pub(super) launched: Launched,
    /// Every rank makes an executable for its span.
    pub(super) merges: bool,
}

/// How the spans of all ranks were launched, or will be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Launched {
    /// As one.
    AsOne,
    /// Each rank launches its own.
    Apart,
    /// As `Apart`, because the driver refused to patch a node; the executable is of no use any more.
    Refused,
}

impl WorldExec {
    /// Makes the executable for the spans of all ranks, in their order, and returns it with the nodes of each rank's work;
    /// nothing if the driver makes no such graph.
    fn new(spans: &[(Arc<Stream>, Span)]) -> Result<Option<(Self, Vec<Vec<NodeHandle>>)>> {
        let Some(((main, first), others)) = spans.split_first() else { return Ok(None) };
        let Some((graph, nodes)) = Graph::merge(main, &first.parts())? else { return Ok(None) };
        let mut all = vec![nodes];
        for (stream, span) in others {
            let Some(nodes) = graph.add_chain(stream.device(), &span.parts())? else { return Ok(None) };
            all.push(nodes);
        }
        let streams: Vec<_> = spans.iter().map(|(stream, _)| Arc::clone(stream)).collect();
        let ready = streams.iter().map(|stream| Event::new(stream.device())).collect::<Result<_>>()?;
        let (exec, done) = (graph.instantiate()?, Event::new(main.device())?);
        Ok(Some((Self { exec, _graph: graph, streams, ready, done }, all)))
    }

    /// Says that this rank's stream has what the launch must wait for.
    pub(super) fn get_ready(&self, rank: usize) -> Result<()> {
        if rank == 0 { Ok(()) } else { self.ready[rank].record(&self.streams[rank]) }
    }

    /// Makes this rank's stream wait for the launch.
    pub(super) fn follow(&self, rank: usize) -> Result<()> {
        if rank == 0 { Ok(()) } else { self.done.hold_back(&self.streams[rank]) }
    }

    /// Patches what differs and launches; `false`, with nothing enqueued, if the driver refuses a patch.
    fn launch(&self, requests: &[Request]) -> Result<bool> {
        for (request, stream) in requests.iter().zip(&self.streams) {
            for (node, listed) in &request.changes {
                let Origin { segment, site, .. } = listed.origin;
                let patched = self.exec.patch_of(stream.device(), *node, &listed.op);
                if !patched.map_err(|error| error.in_break(site, segment))? {
                    return Ok(false);
                }
            }
        }
        let main = &self.streams[0];
        self.ready[1..].iter().try_for_each(|ready| ready.hold_back(main))?;
        self.exec.launch(main)?;
        self.done.record(main)?;
        Ok(true)
    }
}

/// The last rank to come launches what all have, if one executable does it.
pub(super) fn launch_all(requests: &[Request]) -> Result<Vec<Outcome>> {
    let exec = requests[0].exec.clone();
    let is_one = |exec: &Arc<WorldExec>| {
        requests.iter().all(|request| request.exec.as_ref().is_some_and(|other| Arc::ptr_eq(exec, other)))
    };
    let launched = match exec.filter(is_one) {
        None => Launched::Apart,
        Some(exec) => match exec.launch(requests)? {
            true => Launched::AsOne,
            false => Launched::Refused,
        },
    };
    let merges = requests.iter().any(|request| request.has_none) && !requests.iter().any(|request| request.is_spent);
    Ok(vec![Outcome { launched, merges }; requests.len()])
}

/// Makes an executable for this rank's span and those of the other ranks, which come here too. Returns it with the nodes of
/// this rank's work; nothing if each rank is to make its own.
pub(super) fn merge(
    ranks: &Ranks,
    main: &Arc<Stream>,
    span: &Span,
) -> Result<Option<(Arc<WorldExec>, Vec<NodeHandle>)>> {
    let merged = ranks.meet("a merged executable of all ranks", (Arc::clone(main), span.clone()), |spans| {
        let num_ranks = spans.len();
        Ok(match WorldExec::new(&spans) {
            Ok(Some((exec, nodes))) => {
                let exec = Arc::new(exec);
                nodes.into_iter().map(|nodes| Ok(Some((Arc::clone(&exec), nodes)))).collect()
            }
            Ok(None) => (0..num_ranks).map(|_| Ok(None)).collect(),
            Err(error) if matches!(error.root(), Error::OutOfMemory { .. }) => {
                tracing::warn!(%error, "no memory for a merged executable of all ranks; each makes its own");
                (0..num_ranks).map(|_| Ok(None)).collect()
            }
            Err(error) => (0..num_ranks).map(|_| Err(error.to_string())).collect(),
        })
    })?;
    merged.map_err(|message| Error::Ranks { what: "a merged executable of all ranks", message })
}

impl Span {
    /// Returns the segments and the work between them as parts of a merged graph, in order.
    pub(super) fn parts(&self) -> Vec<Part<'_>> {
        let mut parts = Vec::with_capacity(self.num_launches());
        let mut next = 0;
        for (before, segment) in &self.segments {
            parts.extend(self.ops()[next..*before].iter().map(|listed| Part::Op(&listed.op)));
            next = *before;
            let graph = segment.graph.as_ref().map(Graph::handle);
            parts.extend(graph.map(|graph| Part::Graph { graph, is_programmatic: segment.is_programmatic }));
        }
        parts.extend(self.ops()[next..].iter().map(|listed| Part::Op(&listed.op)));
        parts
    }
}
