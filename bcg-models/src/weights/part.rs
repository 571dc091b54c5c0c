//! The part of a tensor that a rank keeps.

use super::Shard;
use crate::error::{Error, Result};

/// A tensor of a checkpoint, and how the ranks divide it.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape, undivided.
    pub shape: &'a [usize],
    /// What each rank keeps of it.
    pub split: Split<'a>,
}

/// How the ranks divide a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split<'a> {
    /// Every rank has all of it.
    Whole,
    /// Every rank has its share of each section of the rows, one after the other. The sections are all rows.
    Rows(&'a [Section]),
    /// Every rank has its share of the last dimension.
    Columns,
}

/// Rows that the ranks divide among themselves: `units` times `rows` of them, and a unit stays together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// What is divided, such as heads.
    pub units: usize,
    /// The rows of each unit, such as the dimensions of a head.
    pub rows: usize,
}

/// Elements that stand in a file at equal distances: `count` times `len` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretches {
    /// Where the first element stands in its tensor.
    pub(super) first: usize,
    pub(super) len: usize,
    /// How far the beginnings of two stretches are apart.
    pub(super) stride: usize,
    pub(super) count: usize,
}

impl<'a> Part<'a> {
    /// A tensor of which every rank has all.
    pub fn whole(name: &'a str, shape: &'a [usize]) -> Self {
        Self { name, shape, split: Split::Whole }
    }

    /// Returns the shape that a rank keeps.
    ///
    /// # Errors
    /// [`Error::TensorMismatch`] if the ranks cannot divide it.
    pub(super) fn kept_shape(&self, shard: Shard) -> Result<Vec<usize>> {
        let refuse = |len: usize| {
            let expected = format!("dimensions that {} ranks divide", shard.num_ranks);
            Err(Error::TensorMismatch { name: self.name.to_owned(), expected, got: format!("{len} in a dimension") })
        };
        let mut kept = self.shape.to_vec();
        match self.split {
            Split::Whole => {}
            Split::Rows(sections) => {
                kept[0] = 0;
                for section in sections {
                    if !shard.divides(section.units) {
                        return refuse(section.units);
                    }
                    kept[0] += shard.share(section.units) * section.rows;
                }
            }
            Split::Columns => {
                let last = kept.len() - 1;
                if !kept[last].is_multiple_of(shard.num_ranks) {
                    return refuse(kept[last]);
                }
                kept[last] = shard.share(kept[last]);
            }
        }
        Ok(kept)
    }

    /// Returns where the elements that a rank keeps stand in the tensor. The shard divides it.
    pub(super) fn stretches(&self, shard: Shard) -> Vec<Stretches> {
        let elements = self.shape.iter().product();
        let run = |first, len| Stretches { first, len, stride: len, count: 1 };
        match self.split {
            Split::Whole => vec![run(0, elements)],
            Split::Rows(sections) => {
                let width: usize = self.shape[1..].iter().product();
                let mut first_row = 0;
                let mut stretches = Vec::with_capacity(sections.len());
                for section in sections {
                    let units = shard.range(section.units);
                    stretches.push(run(
                        (first_row + units.start * section.rows) * width,
                        units.len() * section.rows * width,
                    ));
                    first_row += section.units * section.rows;
                }
                stretches
            }
            Split::Columns => {
                let width = self.shape[self.shape.len() - 1];
                let columns = shard.range(width);
                let count = elements / width;
                vec![Stretches { first: columns.start, len: columns.len(), stride: width, count }]
            }
        }
    }

    /// Returns which of the different parts a rank keeps: ranks that keep the same have the same number.
    pub(super) fn number(&self, shard: Shard) -> usize {
        match self.split {
            Split::Whole => 0,
            Split::Rows(sections) => shard.among(sections.iter().map(|section| section.units).max().unwrap_or(1)).rank,
            Split::Columns => shard.rank,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_and_columns_are_divided_by_themselves() {
        let sections = [Section { units: 4, rows: 2 }, Section { units: 2, rows: 3 }];
        let shape = [14, 5];
        let part = Part { name: "a", shape: &shape, split: Split::Rows(&sections) };
        let second_of_2 = Shard::new(1, 2);
        let run = |first, len| Stretches { first, len, stride: len, count: 1 };
        assert_eq!(part.kept_shape(second_of_2).expect("a shape"), [7, 5]);
        assert_eq!(part.stretches(second_of_2), [run(4 * 5, 4 * 5), run(11 * 5, 3 * 5)]);
        let third_of_4 = Shard::new(2, 4);
        assert_eq!(part.kept_shape(third_of_4).expect("a shape"), [5, 5], "two ranks keep the same of 2 units");
        assert_eq!(part.stretches(third_of_4), [run(4 * 5, 2 * 5), run(11 * 5, 3 * 5)]);
        assert_eq!(part.stretches(Shard::WHOLE), [run(0, 8 * 5), run(8 * 5, 6 * 5)]);

        let shape = [3, 8];
        let part = Part { split: Split::Columns, shape: &shape, ..part };
        assert_eq!(part.kept_shape(second_of_2).expect("a shape"), [3, 4]);
        assert_eq!(part.stretches(second_of_2), [Stretches { first: 4, len: 4, stride: 8, count: 3 }]);
        let error = part.kept_shape(Shard::new(0, 3)).expect_err("8 columns").to_string();
        assert_eq!(error, "tensor `a`: expected dimensions that 3 ranks divide, got 8 in a dimension");
    }
}
