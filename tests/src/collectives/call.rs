//! One call of a collective, and what it must return.

use bcg_kernels as ops;
use bcg_runtime::{DType, Error, OpStream, Result, Tensor};

use super::lane::{Inputs, Known, round};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    AllReduce,
    AllReduceAddRmsNorm,
    AllGatherColumns,
    AllGatherRows,
    AllToAll,
    ReduceScatterRows,
    Broadcast { root: usize },
    SendReceive { to_offset: usize },
}

/// A call: all ranks make the same.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) op: Op,
    pub(super) dtype: DType,
    pub(super) input: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Columns of other numbers at the left and the right of each row.
    pub(super) gaps: (usize, usize),
}

impl Call {
    /// The elements of an input that it needs.
    pub(super) fn elements(&self) -> usize {
        self.rows * self.stride() + self.columns
    }

    /// Tells whether its rows are divided among the ranks.
    pub(super) fn divides_rows(op: Op) -> bool {
        matches!(op, Op::AllToAll | Op::ReduceScatterRows)
    }

    /// Tells whether all ranks get the same.
    pub(super) fn is_replicated(&self) -> bool {
        !matches!(self.op, Op::AllToAll | Op::ReduceScatterRows | Op::SendReceive { .. })
    }

    pub(super) fn num_outputs(&self) -> usize {
        // The fused op is made beside the two that it stands for.
        if self.op == Op::AllReduceAddRmsNorm { 4 } else { 1 }
    }

    fn stride(&self) -> usize {
        self.gaps.0 + self.columns + self.gaps.1
    }

    fn rows_of(&self, flat: &Tensor) -> Result<Tensor> {
        let wide = flat.rows(0..self.rows * self.stride())?.reshape(&[self.rows, self.stride()])?;
        wide.columns(self.gaps.0..self.gaps.0 + self.columns)
    }

    /// Makes the call.
    pub(super) fn run(&self, cx: &mut OpStream, inputs: &Inputs) -> Result<Vec<Tensor>> {
        let x = self.rows_of(inputs.of(self.dtype, self.input))?;
        Ok(match self.op {
            Op::AllReduce => vec![ops::all_reduce(cx, &x)?],
            Op::AllReduceAddRmsNorm => {
                // As in a model, residual and weight are the same on all ranks.
                let residual = ops::broadcast(cx, &self.rows_of(inputs.of(self.dtype, 0))?, 0)?;
                let weight = inputs.of(self.dtype, 0).rows(0..self.columns)?.reshape(&[1, self.columns])?;
                let weight = ops::broadcast(cx, &weight, 0)?.reshape(&[self.columns])?;
                let (normed, sum) = ops::all_reduce_add_rms_norm(cx, &x, &residual, &weight, 1e-6)?;
                let reduced = ops::all_reduce(cx, &x)?;
                let (plain_normed, plain_sum) = ops::add_rms_norm(cx, &reduced, &residual, &weight, 1e-6)?;
                vec![normed, plain_normed, sum, plain_sum]
            }
            Op::AllGatherColumns => vec![ops::all_gather_columns(cx, &x)?],
            Op::AllGatherRows => vec![ops::all_gather_rows(cx, &x)?],
            Op::AllToAll => vec![ops::all_to_all(cx, &x)?],
            Op::ReduceScatterRows => vec![ops::reduce_scatter_rows(cx, &x)?],
            Op::Broadcast { root } => vec![ops::broadcast(cx, &x, root)?],
            Op::SendReceive { to_offset } => vec![ops::send_receive(cx, &x, to_offset)?],
        })
    }

    /// Checks what it returned on a rank, in bits, but that any NaN is as good as another.
    pub(super) fn check(&self, known: &Known, rank: usize, outputs: &[Vec<f32>]) -> Result<()> {
        let num_ranks = known.num_ranks();
        let x = |rank: usize, row: usize, column: usize| {
            known.of(self.dtype, self.input, rank)[row * self.stride() + self.gaps.0 + column]
        };
        let sum = |row: usize, column: usize| {
            let sum = (1..num_ranks).fold(x(0, row, column), |sum, rank| sum + x(rank, row, column));
            round(self.dtype, sum)
        };
        let (rows, columns) = (self.rows, self.columns);
        match self.op {
            Op::AllReduce => self.compare(&outputs[0], rows, columns, sum),
            Op::AllReduceAddRmsNorm => {
                let residual =
                    |row: usize, column: usize| known.of(self.dtype, 0, 0)[row * self.stride() + self.gaps.0 + column];
                self.compare(&outputs[2], rows, columns, |t, c| round(self.dtype, sum(t, c) + residual(t, c)))?;
                self.compare(&outputs[3], rows, columns, |t, c| outputs[2][t * columns + c])?;
                self.compare(&outputs[0], rows, columns, |t, c| outputs[1][t * columns + c])
            }
            Op::AllGatherColumns => {
                self.compare(&outputs[0], rows, columns * num_ranks, |t, c| x(c / columns, t, c % columns))
            }
            Op::AllGatherRows => self.compare(&outputs[0], rows * num_ranks, columns, |t, c| x(t / rows, t % rows, c)),
            Op::AllToAll => {
                let share = rows / num_ranks;
                self.compare(&outputs[0], rows, columns, |t, c| x(t / share, rank * share + t % share, c))
            }
            Op::ReduceScatterRows => {
                let share = rows / num_ranks;
                self.compare(&outputs[0], share, columns, |t, c| sum(rank * share + t, c))
            }
            Op::Broadcast { root } => self.compare(&outputs[0], rows, columns, |t, c| x(root, t, c)),
            Op::SendReceive { to_offset } => {
                let from = (rank + num_ranks - to_offset % num_ranks) % num_ranks;
                self.compare(&outputs[0], rows, columns, |t, c| x(from, t, c))
            }
        }
    }

    fn compare(
        &self,
        actual: &[f32],
        rows: usize,
        columns: usize,
        expected: impl Fn(usize, usize) -> f32,
    ) -> Result<()> {
        if actual.len() != rows * columns {
            return Err(Error::other(format!("{self:?}: {} elements for {rows} × {columns}", actual.len())));
        }
        for (at, actual) in actual.iter().enumerate() {
            let expected = expected(at / columns, at % columns);
            if actual.to_bits() != expected.to_bits() && !(actual.is_nan() && expected.is_nan()) {
                let (row, column) = (at / columns, at % columns);
                return Err(Error::other(format!("{self:?}: [{row}, {column}] is {actual:?}, not {expected:?}")));
            }
        }
        Ok(())
    }
}
