//! The pages of sequences, and the pages that later sequences can share because they begin alike.
//!
//! Full pages whose keys and values are computed stand in a radix tree: an edge is the tokens of one page, so a path from
//! the root spells a prefix. A sequence that begins with it takes those pages as they are and computes the rest. Pages that
//! no sequence uses stay until their room is needed; the least recently used go first, leaves before what leads to them.
//!
//! Invariants, checked by [`PrefixCache::check`]:
//! - a page is free, in one sequence's own lease, or in one node of the tree;
//! - a node is used by the sequences that have it on their path, so whoever uses a node uses all nodes above it;
//! - a page in the tree is never written again: only whole pages of computed tokens go there.
//!
//! After RadixAttention (Zheng et al., SGLang, 2023), with pages as the unit.

use std::collections::{BTreeSet, HashMap};

use bcg_models::state::{PageLease, PagePool, StateLease};

type NodeId = u64;

/// One page of the tree.
#[derive(Debug)]
struct Node {
    /// `None` below the root.
    parent: Option<NodeId>,
    tokens: Box<[u32]>,
    page: PageLease,
    children: HashMap<Box<[u32]>, NodeId>,
    /// Sequences that have it on their path.
    users: usize,
    last_used: u64,
}

/// The pages of one sequence, in order: first those of the tree, then its own. Given back by [`PrefixCache::release`].
#[derive(Debug)]
#[must_use = "pages of the tree stay in use until they are released"]
pub struct SequencePages {
    path: Vec<NodeId>,
    own: PageLease,
    pages: Vec<u32>,
}

impl SequencePages {
    /// The pages, in the order of the sequence's tokens.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Tokens of the pages that came from the tree or went there.
    pub fn num_shared_tokens(&self, cache: &PrefixCache) -> usize {
        self.path.len() * cache.pool.page_size()
    }

    /// The pages of a sequence that were filled for it elsewhere.
    pub fn filled(own: PageLease) -> Self {
        let pages = own.pages().to_vec();
        Self { path: Vec::new(), own, pages }
    }

    /// The sequence's state, for a model that has one.
    pub fn state(&self) -> Option<&StateLease> {
        self.own.state()
    }
}

/// Hands out the pages of a [`PagePool`] and remembers what they hold.
#[derive(Debug)]
pub struct PrefixCache {
    pool: PagePool,
    enabled: bool,
    nodes: HashMap<NodeId, Node>,
    roots: HashMap<Box<[u32]>, NodeId>,
    /// Leaves that no sequence uses, the least recently used first.
    idle_leaves: BTreeSet<(u64, NodeId)>,
    /// Nodes that no sequence uses, leaves or not.
    num_idle: usize,
    next_id: NodeId,
    clock: u64,
}

impl PrefixCache {
    /// Makes a cache over the pages of `pool`; one that is not `enabled` hands pages out and remembers nothing.
    pub fn new(pool: PagePool, enabled: bool) -> Self {
        Self {
            pool,
            enabled,
            nodes: HashMap::new(),
            roots: HashMap::new(),
            idle_leaves: BTreeSet::new(),
            num_idle: 0,
            next_id: 0,
            clock: 0,
        }
    }

    /// Returns the pool.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Returns how many pages the tree holds.
    pub fn num_cached(&self) -> usize {
        self.nodes.len()
    }

    /// Returns how many pages could be handed out: free ones and those that only the tree holds.
    pub fn num_available(&self) -> usize {
        self.pool.num_free() + self.num_idle
    }

    /// Takes the longest prefix of `tokens` that is cached, less than all of them, for a new sequence with room for
    /// `room` tokens. `None` if there are too few pages; nothing was taken then.
    pub fn claim(&mut self, tokens: &[u32], room: usize) -> Option<SequencePages> {
        let own = self.pool.lease(0).ok()?;
        let mut pages = SequencePages { path: Vec::new(), own, pages: Vec::new() };
        // At least one token has to run, or there would be no logits to choose the next one from.
        for key in tokens[..tokens.len() - 1].chunks_exact(self.pool.page_size()) {
            let Some(&child) = self.children(pages.path.last().copied()).get(key) else { break };
            self.enter(&mut pages, child);
        }
        if self.reserve(&mut pages, room) {
            return Some(pages);
        }
        self.release(pages);
        None
    }

    /// Makes room for `tokens` tokens in all, from free pages or from those that nobody uses. `false` if there are too few;
    /// nothing changed then.
    #[must_use]
    pub fn reserve(&mut self, pages: &mut SequencePages, tokens: usize) -> bool {
        let missing = self.pool.pages_for(tokens).saturating_sub(pages.pages.len());
        if missing > self.num_available() {
            return false;
        }
        while self.pool.num_free() < missing {
            let Some(&(_, leaf)) = self.idle_leaves.first() else { return false };
            self.evict(leaf);
        }
        let held = pages.own.pages().len();
        if pages.own.grow(missing).is_err() {
            return false;
        }
        pages.pages.extend_from_slice(&pages.own.pages()[held..]);
        true
    }

    /// Shares the full pages of `tokens`, which the sequence has computed. Where the tree holds a page already, the
    /// sequence goes over to that one and its own is free.
    pub fn publish(&mut self, pages: &mut SequencePages, tokens: &[u32]) {
        if !self.enabled {
            return;
        }
        let keys = tokens.chunks_exact(self.pool.page_size()).skip(pages.path.len());
        for (at, key) in (pages.path.len()..).zip(keys) {
            let parent = pages.path.last().copied();
            let Some(page) = pages.own.split_first() else { return };
            let child = match self.children(parent).get(key) {
                Some(&child) => child,
                None => self.insert(parent, key.into(), page),
            };
            pages.pages.truncate(at);
            self.enter(pages, child);
            pages.pages.extend_from_slice(pages.own.pages());
        }
    }

    /// Takes a sequence's pages back.
    pub fn release(&mut self, pages: SequencePages) {
        self.clock += 1;
        // Its own pages are free when they drop.
        let SequencePages { path, .. } = pages;
        for id in path.into_iter().rev() {
            let Some(node) = self.nodes.get_mut(&id) else { continue };
            node.users -= 1;
            node.last_used = self.clock;
            if node.users == 0 {
                self.num_idle += 1;
                if node.children.is_empty() {
                    self.idle_leaves.insert((self.clock, id));
                }
            }
        }
    }

    /// Forgets all pages that no sequence uses and returns how many those were.
    pub fn flush(&mut self) -> usize {
        let before = self.nodes.len();
        while let Some(&(_, leaf)) = self.idle_leaves.first() {
            self.evict(leaf);
        }
        before - self.nodes.len()
    }

    fn children(&self, parent: Option<NodeId>) -> &HashMap<Box<[u32]>, NodeId> {
        parent.and_then(|id| self.nodes.get(&id)).map_or(&self.roots, |node| &node.children)
    }

    fn children_mut(&mut self, parent: Option<NodeId>) -> &mut HashMap<Box<[u32]>, NodeId> {
        match parent.and_then(|id| self.nodes.get_mut(&id)) {
            Some(node) => &mut node.children,
            None => &mut self.roots,
        }
    }

    /// Puts a node at the end of a sequence's path.
    fn enter(&mut self, pages: &mut SequencePages, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.users == 0 {
            self.num_idle -= 1;
            self.idle_leaves.remove(&(node.last_used, id));
        }
        node.users += 1;
        pages.path.push(id);
        pages.pages.extend_from_slice(node.page.pages());
    }

    /// Adds a node that nobody uses yet; the caller enters it at once.
    fn insert(&mut self, parent: Option<NodeId>, tokens: Box<[u32]>, page: PageLease) -> NodeId {
        let id = self.next_id;
        self.next_id += 1;
        self.children_mut(parent).insert(tokens.clone(), id);
        self.nodes.insert(id, Node { parent, tokens, page, children: HashMap::new(), users: 0, last_used: self.clock });
        self.num_idle += 1;
        id
    }

    /// Drops a leaf that nobody uses; its page is free then.
    fn evict(&mut self, id: NodeId) {
        let Some(node) = self.nodes.remove(&id) else { return };
        self.idle_leaves.remove(&(node.last_used, id));
        self.num_idle -= 1;
        self.children_mut(node.parent).remove(&node.tokens);
        if let Some((parent_id, parent)) = node.parent.and_then(|id| Some((id, self.nodes.get(&id)?)))
            && parent.users == 0
            && parent.children.is_empty()
        {
            self.idle_leaves.insert((parent.last_used, parent_id));
        }
    }

    /// Checks the invariants named at the top of this module; `held` are the pages of all sequences.
    ///
    /// # Panics
    /// Says which invariant is broken.
    pub fn check<'a>(&self, held: impl Iterator<Item = &'a SequencePages> + Clone) {
        self.pool.check(held.clone().map(|pages| &pages.own).chain(self.nodes.values().map(|node| &node.page)));
        let mut users: HashMap<NodeId, usize> = HashMap::new();
        for pages in held {
            let mut parent = None;
            for (id, page) in pages.path.iter().zip(&pages.pages) {
                let node = &self.nodes[id];
                assert_eq!((node.parent, node.page.pages()), (parent, &[*page][..]), "a path follows the tree");
                parent = Some(*id);
                *users.entry(*id).or_default() += 1;
            }
            assert_eq!(&pages.pages[pages.path.len()..], pages.own.pages(), "own pages follow those of the tree");
        }
        let mut idle = 0;
        for (id, node) in &self.nodes {
            assert_eq!(node.users, users.get(id).copied().unwrap_or(0), "node {id} counts its users");
            assert_eq!(self.children(node.parent).get(&node.tokens), Some(id), "node {id} hangs below its parent");
            idle += usize::from(node.users == 0);
            let is_idle_leaf = node.users == 0 && node.children.is_empty();
            assert_eq!(self.idle_leaves.contains(&(node.last_used, *id)), is_idle_leaf, "node {id} among the leaves");
        }
        assert_eq!(self.num_idle, idle, "idle nodes are counted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(num_pages: usize) -> PrefixCache {
        PrefixCache::new(PagePool::new(num_pages, 4), true)
    }

    fn tokens(len: usize, first: u32) -> Vec<u32> {
        (first..).take(len).collect()
    }

    /// Computes `tokens` and gives them back, as a whole sequence does.
    fn run(cache: &mut PrefixCache, tokens: &[u32]) {
        let mut pages = cache.claim(tokens, tokens.len()).expect("room");
        cache.publish(&mut pages, tokens);
        cache.check(std::iter::once(&pages));
        cache.release(pages);
        cache.check(std::iter::empty());
    }

    #[test]
    fn a_prefix_is_taken_from_the_tree_but_never_the_last_token() {
        let mut cache = cache(8);
        run(&mut cache, &tokens(10, 0));
        assert_eq!((cache.num_cached(), cache.num_available()), (2, 8));
        for (len, shared) in [(10, 2), (9, 2), (8, 1), (5, 1), (4, 0), (1, 0)] {
            let pages = cache.claim(&tokens(len, 0), len).expect("room");
            assert_eq!(pages.path.len(), shared, "{len} tokens");
            cache.check(std::iter::once(&pages));
            cache.release(pages);
        }
        let other = cache.claim(&tokens(10, 1), 10).expect("room");
        assert_eq!(other.path.len(), 0);
        cache.release(other);
    }

    #[test]
    fn two_that_computed_the_same_share_one_page_in_the_end() {
        let mut cache = cache(8);
        let tokens = tokens(9, 0);
        let [mut a, mut b] = [0, 1].map(|_| cache.claim(&tokens, 9).expect("room"));
        assert_eq!(cache.pool().num_free(), 2);
        cache.publish(&mut a, &tokens[..4]);
        cache.publish(&mut b, &tokens);
        cache.publish(&mut a, &tokens);
        cache.check([&a, &b].into_iter());
        assert_eq!((&a.pages()[..2], cache.pool().num_free()), (&b.pages()[..2], 4));
        assert_ne!(a.pages()[2], b.pages()[2], "the page that is not full");
        cache.release(a);
        cache.check(std::iter::once(&b));
        cache.release(b);
        assert_eq!(cache.flush(), 2);
        assert_eq!(cache.pool().num_free(), 8);
    }

    #[test]
    fn the_least_recently_used_leaves_go_first_and_what_is_used_stays() {
        let mut cache = cache(4);
        run(&mut cache, &tokens(8, 0));
        run(&mut cache, &tokens(8, 100));
        let used = cache.claim(&tokens(5, 0), 5).expect("room");
        assert_eq!((used.path.len(), cache.num_cached()), (1, 3), "the second page of the first went");
        let mut other = cache.claim(&[7], 1).expect("room");
        assert!(!cache.reserve(&mut other, 9), "one page is left");
        assert!(cache.reserve(&mut other, 8));
        cache.check([&used, &other].into_iter());
        assert_eq!((cache.num_cached(), cache.num_available()), (1, 0));
        cache.release(used);
        cache.release(other);
        assert_eq!(cache.num_available(), 4);
    }

    #[test]
    fn a_claim_that_does_not_fit_takes_nothing() {
        let mut cache = cache(4);
        run(&mut cache, &tokens(8, 0));
        assert!(cache.claim(&tokens(20, 0), 20).is_none());
        cache.check(std::iter::empty());
        assert_eq!((cache.num_cached(), cache.num_available()), (2, 4));
    }

    #[test]
    fn one_that_is_off_remembers_nothing() {
        let mut cache = PrefixCache::new(PagePool::new(4, 4), false);
        run(&mut cache, &tokens(9, 0));
        assert_eq!((cache.num_cached(), cache.pool().num_free()), (0, 4));
    }
}
