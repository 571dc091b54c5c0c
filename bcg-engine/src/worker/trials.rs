//! Which request of a failed step is to blame.
//!
//! A step fails as a whole, but most often one request in it is the reason. Those of a failed step are tried in halves, in
//! steps of their own, beside the steps of all others. A half that succeeds is cleared; one that fails is halved again; a
//! request that fails alone is the reason. Of `n` requests with one to blame, that takes no more than `2 log2(n)` trials,
//! rounded up, and never more than `2 n - 1`: each trial clears a group, halves one, or ends a request.
//!
//! A failure that does not come back, such as a lack of memory for a moment, costs the trials and no request.

use super::super::sequence::SequenceId;

/// The requests that are under suspicion.
#[derive(Debug, Default)]
pub(super) struct Trials {
    /// Groups that wait for their trial; the last one is next.
    groups: Vec<Vec<SequenceId>>,
    /// Those that are on trial and not cleared yet.
    current: Vec<SequenceId>,
}

impl Trials {
    /// Whether anybody is under suspicion.
    pub(super) fn is_on(&self) -> bool {
        !(self.groups.is_empty() && self.current.is_empty())
    }

    /// Whether nobody is on trial right now.
    pub(super) fn is_idle(&self) -> bool {
        self.current.is_empty()
    }

    /// Puts those of a failed step under suspicion.
    pub(super) fn suspect(&mut self, mut suspects: Vec<SequenceId>) {
        let second = suspects.split_off(suspects.len().div_ceil(2));
        self.groups.extend([second, suspects].into_iter().filter(|group| !group.is_empty()));
    }

    /// Those that are on trial now: if nobody is, those of the next group.
    pub(super) fn current(&mut self) -> &[SequenceId] {
        if self.current.is_empty() {
            self.current = self.groups.pop().unwrap_or_default();
        }
        &self.current
    }

    /// Clears a request on trial, or forgets it because it ended or failed.
    pub(super) fn clear(&mut self, id: SequenceId) {
        self.current.retain(|current| *current != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tries `n` requests of which some are to blame; returns those that failed, and the number of trials.
    fn find(n: u64, guilty: &[u64]) -> (Vec<u64>, usize) {
        let (mut trials, mut found, mut count) = (Trials::default(), Vec::new(), 0);
        trials.suspect((0..n).map(SequenceId).collect());
        while trials.is_on() {
            let group = trials.current().to_vec();
            count += 1;
            group.iter().for_each(|id| trials.clear(*id));
            match group.iter().any(|id| guilty.contains(&id.0)) {
                true if group.len() == 1 => found.push(group[0].0),
                true => trials.suspect(group),
                false => {}
            }
        }
        found.sort_unstable();
        (found, count)
    }

    #[test]
    fn the_guilty_and_no_others_are_found_in_few_trials() {
        for n in 1..=65_u64 {
            let most = 2 * (n.next_power_of_two().ilog2() as usize);
            for guilty in 0..n {
                let (found, count) = find(n, &[guilty]);
                assert_eq!(found, [guilty]);
                assert!(count <= most.max(1), "{count} trials for {guilty} of {n}");
            }
            assert_eq!(find(n, &[]), (Vec::new(), n.min(2) as usize), "what does not come back costs two trials");
            let all: Vec<u64> = (0..n).collect();
            let (found, count) = find(n, &all);
            assert!(found == all && count < 2 * n as usize, "{count} trials for all of {n}");
        }
    }
}
