//! Merging captured graphs and single operations into one graph.
//!
//! Nodes of captured graphs are copied one by one, with their edges and launch attributes, and not put in as child
//! graphs: a programmatic edge ends at a kernel node, so only in a flat graph may a kernel after a boundary start
//! before the one ahead of it has ended.

use std::collections::{HashMap, HashSet};

use super::super::traits::{NodeHandle, Part};
use super::CudaBackend;
use super::sys::nodes::{Edge, FULL, KERNEL, KernelNode, PROGRAMMATIC};
use crate::Result;
use crate::op::{Op, RowCopy};

/// A node, and whether it is a kernel.
type NodeKind = (u64, bool);

/// Puts a merged graph together.
pub(super) struct Merge<'a> {
    backend: &'a CudaBackend,
    graph: u64,
    /// Nodes of the last part on which no other depends.
    frontier: Vec<NodeKind>,
    edges: Vec<Edge>,
}

impl<'a> Merge<'a> {
    pub(super) fn new(backend: &'a CudaBackend, graph: u64) -> Self {
        Self { backend, graph, frontier: Vec::new(), edges: Vec::new() }
    }

    /// Adds all parts and returns the nodes of the operations; nothing if a captured node cannot be copied.
    pub(super) fn add_all(mut self, parts: &[Part<'_>]) -> Result<Option<Vec<NodeHandle>>> {
        let mut nodes = Vec::new();
        for part in parts {
            match part {
                Part::Graph { graph, is_programmatic } => {
                    if !self.add_graph(graph.0, *is_programmatic)? {
                        return Ok(None);
                    }
                }
                Part::Op(op) => {
                    let node = (self.backend.add_node(self.graph, op)?, matches!(op, Op::Launch(_)));
                    self.follow(&[node], op.is_programmatic())?;
                    self.frontier = vec![node];
                    nodes.push(NodeHandle(node.0));
                }
            }
        }
        Ok(self.holds_its_edges()?.then_some(nodes))
    }

    fn add_edge(&mut self, edge: Edge) -> Result<()> {
        self.edges.push(edge);
        self.backend.driver.add_edge(self.graph, &edge)
    }

    /// Tells whether the driver holds the edges that were added, beside those of other ranks: a kernel that starts early
    /// though it must not would compute from memory that is not written yet, and nothing else would show it.
    fn holds_its_edges(&self) -> Result<bool> {
        let own: HashSet<u64> = self.edges.iter().flat_map(|(from, to, _)| [*from, *to]).collect();
        let sorted = |edges: &[Edge]| {
            let mut edges: Vec<_> = edges
                .iter()
                .filter(|(from, to, _)| own.contains(from) || own.contains(to))
                .map(|(from, to, data)| (*from, *to, data.from_port, data.type_))
                .collect();
            edges.sort_unstable();
            edges
        };
        let is_held = sorted(&self.backend.driver.graph_edges(self.graph)?) == sorted(&self.edges);
        if !is_held {
            tracing::warn!("the driver holds other edges than were added to a merged graph; going on with the chain");
        }
        Ok(is_held)
    }

    /// Makes the first nodes of a part depend on the part before.
    fn follow(&mut self, roots: &[NodeKind], is_programmatic: bool) -> Result<()> {
        let overlaps = matches!((&*self.frontier, roots), ([(_, true)], [(_, true)]));
        let data = if is_programmatic && overlaps && self.backend.can_overlap { PROGRAMMATIC } else { FULL };
        let before = |root: &NodeKind| {
            let root = root.0;
            self.frontier.iter().map(move |node| (node.0, root, data))
        };
        let edges: Vec<Edge> = roots.iter().flat_map(before).collect();
        edges.into_iter().try_for_each(|edge| self.add_edge(edge))
    }

    /// Copies a graph; `false` if it holds a node that cannot be copied.
    fn add_graph(&mut self, graph: u64, is_programmatic: bool) -> Result<bool> {
        let driver = self.backend.driver;
        let mut copies: HashMap<u64, NodeKind> = HashMap::new();
        let mut added = Vec::new();
        for node in driver.graph_nodes(graph)? {
            let kind = driver.node_type(node)?;
            let Some(copy) = driver.copy_node(self.graph, node, kind, self.backend.context)? else {
                tracing::debug!(kind, "a captured node of this type cannot be copied into a merged graph");
                return Ok(false);
            };
            copies.insert(node, (copy, kind == KERNEL));
            added.push(node);
        }
        let edges = driver.graph_edges(graph)?;
        edges.iter().try_for_each(|(from, to, data)| self.add_edge((copies[from].0, copies[to].0, *data)))?;
        let without = |end: fn(&Edge) -> u64| -> Vec<NodeKind> {
            let has_none = |node: &&u64| !edges.iter().any(|edge| end(edge) == **node);
            added.iter().filter(has_none).map(|node| copies[node]).collect()
        };
        let (roots, leaves) = (without(|edge| edge.1), without(|edge| edge.0));
        self.follow(&roots, is_programmatic)?;
        if !leaves.is_empty() {
            self.frontier = leaves;
        }
        Ok(true)
    }
}

impl CudaBackend {
    /// Adds a node without dependencies.
    fn add_node(&self, graph: u64, op: &Op) -> Result<u64> {
        let (driver, context) = (self.driver, self.context);
        match op {
            Op::Launch(launch) => {
                let function = self.launchable(launch)?;
                let kernel = KernelNode { function: function.raw, dims: &launch.dims, args: launch.args.as_slice() };
                // SAFETY: `launchable` establishes that the arguments are as long as the kernel's parameter; their
                // addresses come from `OpStream::addr`, and every launch follows a patch to those of its own run.
                unsafe { driver.add_kernel(graph, &kernel) }
            }
            Op::Fill { dst, byte, bytes } => driver.add_fill(graph, *dst, *byte, *bytes, context),
            Op::Copy(copy) => driver.add_copy(graph, copy, false, context),
            Op::CopyFromPinned { dst, src, bytes } => {
                driver.add_copy(graph, &RowCopy::piece(*dst, *src, *bytes), true, context)
            }
        }
    }

    /// Changes a node of an executable; `false` if the driver refuses.
    pub(super) fn set_node(&self, exec: u64, node: u64, op: &Op) -> Result<bool> {
        let (driver, context) = (self.driver, self.context);
        match op {
            Op::Launch(launch) => {
                let function = self.launchable(launch)?;
                let kernel = KernelNode { function: function.raw, dims: &launch.dims, args: launch.args.as_slice() };
                // SAFETY: as in `add_node`.
                unsafe { driver.set_kernel(exec, node, &kernel) }
            }
            Op::Fill { dst, byte, bytes } => driver.set_fill(exec, node, (*dst, *byte, *bytes), context),
            Op::Copy(copy) => driver.set_copy(exec, node, copy, false, context),
            Op::CopyFromPinned { dst, src, bytes } => {
                driver.set_copy(exec, node, &RowCopy::piece(*dst, *src, *bytes), true, context)
            }
        }
    }
}
