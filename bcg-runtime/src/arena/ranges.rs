//! Which bytes of the arena are free: a sorted list of ranges, without a device.
//!
//! Invariants: ranges are sorted, not empty, do not touch, and lie within `[0, end)`; every offset and length is a
//! multiple of [`ALIGNMENT`].

/// Blocks start at multiples of this many bytes, as `cuMemAlloc` promises at least.
pub(crate) const ALIGNMENT: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: usize,
    end: usize,
}

/// The free bytes of an address range that can grow at its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct FreeRanges {
    free: Vec<Range>,
    end: usize,
}

impl FreeRanges {
    /// Makes `[used, end)` free and nothing else.
    pub(crate) fn reset(&mut self, used: usize, end: usize) {
        self.free.clear();
        self.end = end;
        if used < end {
            self.free.push(Range { start: used, end });
        }
    }

    /// Grows the range to `end`; the new bytes are free.
    pub(crate) fn extend(&mut self, end: usize) {
        let start = std::mem::replace(&mut self.end, end);
        if start < end {
            self.free(start, end - start);
        }
    }

    /// Takes the lowest range that fits, so that the extent of a forward stays small. Returns its offset.
    pub(crate) fn alloc(&mut self, bytes: usize) -> Option<usize> {
        let index = self.free.iter().position(|range| range.end - range.start >= bytes)?;
        let range = &mut self.free[index];
        let offset = range.start;
        range.start += bytes;
        if range.start == range.end {
            self.free.remove(index);
        }
        Some(offset)
    }

    /// Gives a range back.
    pub(crate) fn free(&mut self, start: usize, bytes: usize) {
        let end = start + bytes;
        let index = self.free.partition_point(|range| range.start < start);
        debug_assert!(index == 0 || self.free[index - 1].end <= start, "double free below {start}");
        debug_assert!(index == self.free.len() || end <= self.free[index].start, "double free at {start}");
        let joins_left = index > 0 && self.free[index - 1].end == start;
        let joins_right = index < self.free.len() && self.free[index].start == end;
        match (joins_left, joins_right) {
            (true, true) => self.free[index - 1].end = self.free.remove(index).end,
            (true, false) => self.free[index - 1].end = end,
            (false, true) => self.free[index].start = start,
            (false, false) => self.free.insert(index, Range { start, end }),
        }
    }

    /// Returns the bytes missing at the end for a block of `bytes`.
    pub(crate) fn missing(&self, bytes: usize) -> usize {
        let tail = self.free.last().filter(|range| range.end == self.end).map_or(0, |range| range.end - range.start);
        bytes.saturating_sub(tail)
    }

    /// Returns the number of free bytes.
    #[cfg(test)]
    pub(crate) fn free_bytes(&self) -> usize {
        self.free.iter().map(|range| range.end - range.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The naive model: one flag for each unit.
    struct Units(Vec<bool>);

    impl Units {
        fn take(&mut self, start: usize, len: usize) {
            for unit in &mut self.0[start..start + len] {
                assert!(!*unit, "a unit is handed out twice");
                *unit = true;
            }
        }

        fn give(&mut self, start: usize, len: usize) {
            self.0[start..start + len].fill(false);
        }

        fn first_fit(&self, len: usize) -> Option<usize> {
            (0..(self.0.len() + 1).saturating_sub(len))
                .find(|&start| self.0[start..start + len].iter().all(|used| !used))
        }
    }

    proptest::proptest! {
        #[test]
        fn free_ranges_behave_as_a_naive_list_of_units(steps in proptest::collection::vec((0u8..4, 1usize..9), 1..200)) {
            let mut ranges = FreeRanges::default();
            let mut units = Units(vec![false; 16]);
            ranges.reset(0, 16);
            let mut held: Vec<(usize, usize)> = Vec::new();
            for (kind, size) in steps {
                match kind {
                    0 | 1 => {
                        let got = ranges.alloc(size);
                        assert_eq!(got, units.first_fit(size));
                        if let Some(start) = got {
                            units.take(start, size);
                            held.push((start, size));
                        }
                    }
                    2 if !held.is_empty() => {
                        let (start, len) = held.swap_remove(size % held.len());
                        ranges.free(start, len);
                        units.give(start, len);
                    }
                    3 => {
                        let end = units.0.len() + size;
                        ranges.extend(end);
                        units.0.resize(end, false);
                    }
                    _ => {}
                }
                assert_eq!(ranges.free_bytes(), units.0.iter().filter(|used| !**used).count());
                assert!(ranges.free.windows(2).all(|pair| pair[0].end < pair[1].start), "sorted and merged");
            }
        }
    }

    #[test]
    fn missing_counts_the_free_tail() {
        let mut ranges = FreeRanges::default();
        ranges.reset(0, 10);
        assert_eq!(ranges.alloc(8), Some(0));
        assert_eq!(ranges.missing(5), 3);
        assert_eq!(ranges.missing(2), 0);
    }
}
