//! Which layers each stage of a pipeline has.

use std::ops::Range;

/// Divides layers among stages, in order and as evenly as their bytes allow: the largest stage is as small as can be, and
/// of such divisions the one with the smallest sum of squares is taken, as far as it is found stage by stage. `None` if
/// there are fewer layers than stages, or no stages.
///
/// The bytes of weights stand for the time of a decode, which reads all of them, and for what a stage takes of its device.
///
/// # Example
/// ```
/// use bcg_models::weights::divide_layers;
/// assert_eq!(divide_layers(&[7, 5, 5, 5, 5, 7], 2), Some(vec![0..3, 3..6]));
/// assert_eq!(divide_layers(&[7, 5, 5, 5, 5, 7], 3), Some(vec![0..2, 2..4, 4..6]));
/// assert_eq!(divide_layers(&[1, 1, 9], 2), Some(vec![0..2, 2..3]));
/// assert_eq!(divide_layers(&[1, 1], 3), None);
/// ```
pub fn divide_layers(layer_bytes: &[usize], num_stages: usize) -> Option<Vec<Range<usize>>> {
    let num_layers = layer_bytes.len();
    if !(1..=num_layers).contains(&num_stages) {
        return None;
    }
    let mut ends = vec![0];
    ends.extend(layer_bytes.iter().scan(0, |sum, bytes| {
        *sum += bytes;
        Some(*sum)
    }));
    // The cost of the first `end` layers on as many stages as the table has rows, and where the last of them begins.
    let cost_of = |range: Range<usize>| (ends[range.end] - ends[range.start]) as u128;
    let mut table: Vec<Vec<Option<(Cost, usize)>>> = Vec::with_capacity(num_stages);
    for stage in 0..num_stages {
        let row = (0..=num_layers).map(|end| match table.last() {
            None => (end > 0).then(|| (Cost::default().with(cost_of(0..end)), 0)),
            Some(before) => (stage..end)
                .filter_map(|begin| Some((before[begin]?.0.with(cost_of(begin..end)), begin)))
                .min_by_key(|(cost, _)| *cost),
        });
        let row = row.collect();
        table.push(row);
    }
    let mut end = num_layers;
    let mut stages = Vec::with_capacity(num_stages);
    for row in table.iter().rev() {
        let (_, begin) = row[end]?;
        stages.push(begin..end);
        end = begin;
    }
    stages.reverse();
    Some(stages)
}

/// What a division costs, in the order of importance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    most: u128,
    squares: u128,
}

impl Cost {
    /// With one more stage of so many bytes.
    fn with(self, bytes: u128) -> Self {
        Self { most: self.most.max(bytes), squares: self.squares + bytes * bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of the largest stage of the best division, by trying all.
    fn least_most(bytes: &[usize], num_stages: usize) -> usize {
        match num_stages {
            1 => bytes.iter().sum(),
            _ => (1..=bytes.len() + 1 - num_stages)
                .map(|first| bytes[..first].iter().sum::<usize>().max(least_most(&bytes[first..], num_stages - 1)))
                .min()
                .expect("a stage has a layer"),
        }
    }

    #[test]
    fn the_largest_stage_is_as_small_as_can_be_and_no_layer_is_lost() {
        let mut state = 7_usize;
        for round in 0..300 {
            let bytes: Vec<usize> = (0..1 + round % 9)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    1 + (state >> 40) % 20
                })
                .collect();
            for num_stages in 1..=bytes.len() {
                let stages = divide_layers(&bytes, num_stages).expect("enough layers");
                assert_eq!((stages[0].start, stages[num_stages - 1].end), (0, bytes.len()));
                assert!(stages.windows(2).all(|pair| pair[0].end == pair[1].start), "{stages:?}");
                assert!(stages.iter().all(|stage| !stage.is_empty()), "{stages:?}");
                let most = stages.iter().map(|stage| bytes[stage.clone()].iter().sum::<usize>()).max();
                assert_eq!(most, Some(least_most(&bytes, num_stages)), "{bytes:?} on {num_stages}: {stages:?}");
            }
            assert_eq!(divide_layers(&bytes, bytes.len() + 1), None);
            assert_eq!(divide_layers(&bytes, 0), None);
        }
    }
}
