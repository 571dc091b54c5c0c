//! The reference: runs a program on plain vectors, one operation after the other, without knowing streams or breaks.

use std::cell::RefCell;
use std::rc::Rc;

use super::program::{Break, Coef, Op, PERSISTENT_COLS, Plain, Program};
use super::run::{Batch, Outcome, fill_value, upload_data};

/// A matrix that may share its elements.
#[derive(Clone, Debug)]
struct Matrix {
    data: Rc<RefCell<Vec<i32>>>,
    start: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Matrix {
    fn new(rows: usize, cols: usize, data: Vec<i32>) -> Self {
        Self { data: Rc::new(RefCell::new(data)), start: 0, rows, cols, stride: cols }
    }

    fn get(&self, t: usize, c: usize) -> i32 {
        self.data.borrow()[self.start + t * self.stride + c]
    }

    fn set(&self, t: usize, c: usize, value: i32) {
        self.data.borrow_mut()[self.start + t * self.stride + c] = value;
    }

    fn size(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn elements(&self) -> Vec<i32> {
        (0..self.rows * self.cols).map(|i| self.get(i / self.cols, i % self.cols)).collect()
    }

    /// A fresh matrix of the same size.
    fn map(&self, f: impl Fn(usize, usize) -> i32) -> Self {
        let data = (0..self.rows * self.cols).map(|i| f(i / self.cols, i % self.cols)).collect();
        Self::new(self.rows, self.cols, data)
    }

    fn assign(&self, from: &Self) {
        let values = from.elements();
        values.iter().enumerate().for_each(|(i, value)| self.set(i / self.cols, i % self.cols, *value));
    }
}

/// What one frame (captured code, or the body of a break) sees.
struct Frame<'a> {
    live: &'a Batch,
    persistent: &'a [Matrix],
    rows: usize,
    vars: Vec<Option<Matrix>>,
    /// Read back in this frame.
    locals: Vec<i32>,
    /// Returned by breaks before.
    earlier: Vec<i32>,
}

/// Runs a program on `rows` rows, on all ranks, each with its persistent tensors. Returns what each rank leaves.
pub(super) fn interpret(program: &Program, live: &Batch, rows: usize, inputs: &[Vec<Vec<i32>>]) -> Vec<Outcome> {
    let matrix = |(data, cols): (&Vec<i32>, usize)| Matrix::new(data.len() / cols, cols, data.clone());
    let persistent: Vec<Vec<Matrix>> =
        inputs.iter().map(|tensors| tensors.iter().zip(PERSISTENT_COLS).map(matrix).collect()).collect();
    let frame =
        |persistent| Frame { live, persistent, rows, vars: Vec::new(), locals: Vec::new(), earlier: Vec::new() };
    let mut frames: Vec<Frame<'_>> = persistent.iter().map(|persistent| frame(persistent)).collect();
    run(&mut frames, &program.ops);
    let outcome = |frame: Frame<'_>| Outcome {
        tensors: frame.vars.iter().flatten().map(Matrix::elements).collect(),
        hosts: frame.earlier,
        persistent: frame.persistent.iter().map(Matrix::elements).collect(),
    };
    frames.into_iter().map(outcome).collect()
}

/// Runs operations on all ranks, one after the other.
fn run(ranks: &mut [Frame<'_>], ops: &[Op]) {
    for op in ops {
        match op {
            Op::Break(step) => annotated(ranks, step),
            Op::SumRanks { out, x } => {
                let (first, others) = ranks.split_first().expect("at least one rank");
                let mut sum = first.var(*x).elements();
                for other in others {
                    sum.iter_mut().zip(other.var(*x).elements()).for_each(|(sum, x)| *sum = sum.wrapping_add(x));
                }
                for rank in ranks.iter_mut() {
                    let (rows, cols) = rank.var(*x).size();
                    rank.set(*out, Matrix::new(rows, cols, sum.clone()));
                }
            }
            Op::OfRank { out, x, offset } => {
                let all: Vec<Vec<i32>> = ranks.iter().map(|rank| rank.var(*x).elements()).collect();
                for (at, rank) in ranks.iter_mut().enumerate() {
                    let (rows, cols) = rank.var(*x).size();
                    rank.set(*out, Matrix::new(rows, cols, all[(at + offset) % all.len()].clone()));
                }
            }
            op => ranks.iter_mut().for_each(|rank| rank.run(op)),
        }
    }
}

/// Calls an annotated function on all ranks.
fn annotated(ranks: &mut [Frame<'_>], step: &Break) {
    let mut frames: Vec<_> = ranks.iter().map(|outer| outer.inner(step)).collect();
    run(&mut frames, &step.body);
    ranks.iter_mut().zip(&frames).for_each(|(outer, inner)| outer.take_outputs(step, inner));
}

impl Frame<'_> {
    fn run(&mut self, op: &Op) {
        match op {
            Op::Plain(plain) => self.plain(plain),
            Op::EndSegment | Op::LiveScratch { .. } => {}
            Op::Break(_) | Op::SumRanks { .. } | Op::OfRank { .. } => unreachable!("done on all ranks together"),
            Op::LiveMix { out, coef, x, y } => {
                let a = self.coef(*coef);
                self.mix(*out, [a, 1, 0], *x, *y);
            }
            Op::LiveUpload { out, coef, cols } => {
                self.set(*out, Matrix::new(1, *cols, upload_data(self.live.coefs[*coef], *cols)));
            }
            Op::LiveIf { out, coef, x, y } => {
                let coefs = if self.live.coefs[*coef] > 0 { [3, 1, 0] } else { [2, 1, 5] };
                self.mix(*out, coefs, *x, *y);
            }
            Op::LivePick { out, x } => self.set(*out, self.var(*x).clone()),
            Op::ReadBack { x } => self.locals.push(self.var(*x).elements().into_iter().fold(0, i32::wrapping_add)),
        }
    }

    fn var(&self, index: usize) -> &Matrix {
        self.vars[index].as_ref().expect("a variable that is there")
    }

    fn set(&mut self, index: usize, matrix: Matrix) {
        if self.vars.len() <= index {
            self.vars.resize(index + 1, None);
        }
        self.vars[index] = Some(matrix);
    }

    fn coef(&self, coef: Coef) -> i32 {
        match coef {
            Coef::Live(index) => self.live.coefs[index],
            Coef::Local(index) => self.locals[index],
            Coef::Earlier(index) => self.earlier[index],
        }
    }

    fn mix(&mut self, out: usize, [a, b, k]: [i32; 3], x: usize, y: usize) {
        let (x, y) = (self.var(x), self.var(y));
        let value = |t, c| a.wrapping_mul(x.get(t, c)).wrapping_add(b.wrapping_mul(y.get(t, c))).wrapping_add(k);
        let mixed = x.map(value);
        self.set(out, mixed);
    }

    fn valid(&self, x: &Matrix) -> usize {
        self.live.rows.map_or(usize::MAX, |rows| rows.valid).min(x.rows)
    }

    /// What the body of an annotated function sees when it begins.
    fn inner(&self, step: &Break) -> Self {
        Self {
            live: self.live,
            persistent: self.persistent,
            rows: self.rows,
            vars: step.args.iter().map(|&arg| Some(self.var(arg).clone())).collect(),
            locals: Vec::new(),
            earlier: self.earlier.clone(),
        }
    }

    /// Takes over what an annotated function returned.
    fn take_outputs(&mut self, step: &Break, inner: &Self) {
        for (inside, outside) in &step.outputs {
            let output = inner.var(*inside).clone();
            if let Some(rows) = self.live.rows.filter(|rows| rows.padded == output.rows) {
                for t in rows.valid..rows.padded {
                    (0..output.cols).for_each(|c| output.set(t, c, 0));
                }
            }
            self.set(*outside, output);
        }
        let hosts: Vec<i32> = step.hosts.iter().map(|&host| inner.coef(host)).collect();
        self.earlier.extend(hosts);
    }

    fn plain(&mut self, op: &Plain) {
        match op {
            Plain::Persistent { out, number } => {
                let view = Matrix { rows: self.rows, ..self.persistent[*number].clone() };
                self.set(*out, view);
            }
            Plain::Mix { out, coefs, x, y } => self.mix(*out, *coefs, *x, *y),
            Plain::MixInto { into, coefs, x, y } => {
                let into = self.var(*into).clone();
                self.vars.push(None);
                let temporary = self.vars.len() - 1;
                self.mix(temporary, *coefs, *x, *y);
                into.assign(self.var(temporary));
                self.vars.pop();
            }
            Plain::CopyNew { out, x } => {
                let copy = self.var(*x).map(|t, c| self.var(*x).get(t, c));
                self.set(*out, copy);
            }
            Plain::Copy { into, x } => self.var(*into).assign(self.var(*x)),
            Plain::Fill { into, byte } => {
                let filled = self.var(*into).map(|_, _| fill_value(*byte));
                self.var(*into).assign(&filled);
            }
            Plain::Columns { out, x, from, to } => {
                let x = self.var(*x).clone();
                self.set(*out, Matrix { start: x.start + from, cols: to - from, ..x });
            }
            Plain::Head { out, x } => self.set(*out, Matrix { rows: 1, ..self.var(*x).clone() }),
            Plain::Split { out, x } => self.set(*out, self.var(*x).clone()),
            Plain::Drop { x } => self.vars[*x] = None,
            Plain::Scope { sides, own } => sides.iter().chain([own]).flatten().for_each(|op| self.plain(op)),
            Plain::Events { side, own } => side.iter().chain(own).for_each(|op| self.plain(op)),
            Plain::Gather { .. } | Plain::AddRow { .. } | Plain::SumRows { .. } | Plain::ScanRows { .. } => {
                self.rows_op(op);
            }
        }
    }

    /// The operations that mix rows.
    fn rows_op(&mut self, op: &Plain) {
        let (out, result) = match op {
            Plain::Gather { out, x, index } => {
                let (x, index) = (self.var(*x), self.var(*index));
                let from = |t| (index.get(t, 0) as u32 % x.rows as u32) as usize;
                let data = (0..index.rows).flat_map(|t| (0..x.cols).map(move |c| (t, c)));
                (*out, Matrix::new(index.rows, x.cols, data.map(|(t, c)| x.get(from(t), c)).collect()))
            }
            Plain::AddRow { out, x, row } => {
                let (x, row) = (self.var(*x), self.var(*row));
                (*out, x.map(|t, c| x.get(t, c).wrapping_add(row.get(0, c))))
            }
            Plain::SumRows { out, x } => {
                let x = self.var(*x);
                let sum = |c| (0..self.valid(x)).fold(0i32, |sum, t| sum.wrapping_add(x.get(t, c)));
                (*out, Matrix::new(1, x.cols, (0..x.cols).map(sum).collect()))
            }
            Plain::ScanRows { out, x } => {
                let x = self.var(*x);
                let valid = self.valid(x);
                (*out, x.map(|from, c| (from..valid).fold(0i32, |sum, t| sum.wrapping_add(x.get(t, c)))))
            }
            _ => return,
        };
        self.set(out, result);
    }
}
