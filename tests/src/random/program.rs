//! What a random program is, and how one is made.
//!
//! A program is a list of operations on numbered variables. Variables are i32 matrices of `T` rows (the capture size, known
//! when the program runs) or of one row; several may share memory. The generator tracks which memory a variable means, so
//! that what it writes is free of races: an operation writes fresh memory, or memory that it reads at the same elements
//! or not at all, and work on side streams writes only what it made itself.

use super::rng::Rng;

/// Columns of the persistent tensors, and the rows that they have at most.
pub(super) const PERSISTENT_COLS: [usize; 3] = [4, 6, 3];
pub(super) const ROWS_MAX: usize = 7;
/// Host values of a live batch.
pub(super) const NUM_COEFS: usize = 4;

/// One operation. `out` is the variable that it defines.
#[derive(Clone, Debug)]
pub(super) enum Plain {
    /// The first `T` rows of a persistent tensor, which later operations may write.
    Persistent {
        out: usize,
        number: usize,
    },
    Mix {
        out: usize,
        coefs: [i32; 3],
        x: usize,
        y: usize,
    },
    /// As `Mix`, into an existing variable.
    MixInto {
        into: usize,
        coefs: [i32; 3],
        x: usize,
        y: usize,
    },
    CopyNew {
        out: usize,
        x: usize,
    },
    Copy {
        into: usize,
        x: usize,
    },
    Fill {
        into: usize,
        byte: u8,
    },
    Columns {
        out: usize,
        x: usize,
        from: usize,
        to: usize,
    },
    /// The first row.
    Head {
        out: usize,
        x: usize,
    },
    /// The same columns as two groups: `[T, 2, C / 2]`.
    Split {
        out: usize,
        x: usize,
    },
    Gather {
        out: usize,
        x: usize,
        index: usize,
    },
    AddRow {
        out: usize,
        x: usize,
        row: usize,
    },
    SumRows {
        out: usize,
        x: usize,
    },
    ScanRows {
        out: usize,
        x: usize,
    },
    /// Drops the variable's handle.
    Drop {
        x: usize,
    },
    /// Side streams of a scope, and work of the stream that opened it.
    Scope {
        sides: Vec<Vec<Plain>>,
        own: Vec<Plain>,
    },
    /// A stream of the program's own that forks and joins through events.
    Events {
        side: Vec<Plain>,
        own: Vec<Plain>,
    },
}

/// A host value that a break multiplies with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Coef {
    /// Of the live batch.
    Live(usize),
    /// Read back in this break.
    Local(usize),
    /// Returned by an earlier break.
    Earlier(usize),
}

/// One operation of captured code, or of a break (where the live ones may stand).
#[derive(Clone, Debug)]
pub(super) enum Op {
    Plain(Plain),
    /// `break_graph()`.
    EndSegment,
    Break(Box<Break>),
    LiveMix {
        out: usize,
        coef: Coef,
        x: usize,
        y: usize,
    },
    /// A fresh matrix of one row from host data that depends on the live batch.
    LiveUpload {
        out: usize,
        coef: usize,
        cols: usize,
    },
    /// Memory of a size that depends on the live batch, kept to the end of the break or not.
    LiveScratch {
        coef: usize,
        keep: bool,
    },
    /// One or two kernels, and their scratch memory, by a flag of the live batch.
    LiveIf {
        out: usize,
        coef: usize,
        x: usize,
        y: usize,
    },
    /// `x` itself or a copy, by the live batch; a copy at capture.
    LivePick {
        out: usize,
        x: usize,
    },
    /// The sum of all elements, as a host value.
    ReadBack {
        x: usize,
    },
    /// The sum of all ranks' matrices.
    SumRanks {
        out: usize,
        x: usize,
    },
    /// The matrix of the rank that is so many further.
    OfRank {
        out: usize,
        x: usize,
        offset: usize,
    },
}

/// An annotated call.
#[derive(Clone, Debug)]
pub(super) struct Break {
    /// Variables outside, which are 0, 1, … inside.
    pub(super) args: Vec<usize>,
    pub(super) body: Vec<Op>,
    /// Variables inside, and what they are outside.
    pub(super) outputs: Vec<(usize, usize)>,
    /// Host values inside that are returned.
    pub(super) hosts: Vec<Coef>,
    /// Which of the annotated functions is called.
    pub(super) kind: Kind,
}

/// How a break returns its outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One tensor.
    Tensor,
    /// A tuple of vectors.
    Tuple,
    /// A struct with an option in it.
    Struct,
}

/// A program, and how it is run.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) ops: Vec<Op>,
    /// Capture sizes, in the order of their captures.
    pub(super) sizes: Vec<usize>,
    pub(super) is_padded: bool,
    pub(super) poison: bool,
    pub(super) num_ranks: usize,
}

impl Program {
    /// Makes the program of a seed. With several ranks it has collectives, and breaks that a capture need not run.
    pub(super) fn random(seed: u64, num_ranks: usize) -> Self {
        let mut rng = Rng::new(seed);
        let is_padded = rng.chance(2);
        let poison = rng.chance(2);
        let mut sizes: Vec<usize> = (0..=rng.below(3)).map(|_| 1 + rng.below(ROWS_MAX)).collect();
        sizes.dedup();
        let num_bufs = PERSISTENT_COLS.len();
        let mut generator = Generator { rng, num_bufs, readonly: Vec::new(), is_padded, num_hosts: 0, num_ranks };
        let mut frame = Frame::default();
        for number in 0..PERSISTENT_COLS.len() {
            if number == 0 || generator.rng.chance(2) {
                frame.ops.push(Op::Plain(generator.persistent(&mut frame.vars, number)));
            }
        }
        let len = 3 + generator.rng.below(14);
        generator.captured(&mut frame, len);
        Self { ops: frame.ops, sizes, is_padded, poison, num_ranks }
    }
}

/// The rows of a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RowKind {
    All,
    One,
}

/// What the generator knows of a variable.
#[derive(Clone, Copy, Debug)]
struct Var {
    buf: usize,
    first_col: usize,
    cols: usize,
    rows: RowKind,
    is_split: bool,
    /// Made on a side stream that is not joined yet, or dropped.
    is_hidden: bool,
}

impl Var {
    fn has_shape_of(&self, other: &Self) -> bool {
        (self.cols, self.rows, self.is_split) == (other.cols, other.rows, other.is_split)
    }

    fn is_disjoint(&self, other: &Self) -> bool {
        let ends_before = |a: &Self, b: &Self| a.first_col + a.cols <= b.first_col;
        self.buf != other.buf || ends_before(self, other) || ends_before(other, self)
    }

    /// Each element is written where it is read, or the memory is not shared at all.
    fn may_be_written_from(&self, x: &Self) -> bool {
        self.is_disjoint(x) || (self.has_shape_of(x) && self.first_col == x.first_col)
    }
}

/// Captured code, or the body of a break, while it is made.
#[derive(Default)]
struct Frame {
    ops: Vec<Op>,
    vars: Vec<Var>,
    num_locals: usize,
}

struct Generator {
    rng: Rng,
    num_bufs: usize,
    /// Memory that two variables may or may not share, by the live batch: never written.
    readonly: Vec<usize>,
    is_padded: bool,
    /// Host values that breaks of captured code returned so far.
    num_hosts: usize,
    num_ranks: usize,
}

impl Generator {
    fn fresh(&mut self, vars: &mut Vec<Var>, shape: Var) -> usize {
        vars.push(Var { buf: self.num_bufs, first_col: 0, is_hidden: false, ..shape });
        self.num_bufs += 1;
        vars.len() - 1
    }

    fn persistent(&mut self, vars: &mut Vec<Var>, number: usize) -> Plain {
        let cols = PERSISTENT_COLS[number];
        vars.push(Var { buf: number, first_col: 0, cols, rows: RowKind::All, is_split: false, is_hidden: false });
        Plain::Persistent { out: vars.len() - 1, number }
    }

    fn pick(&mut self, vars: &[Var], fits: impl Fn(&Var) -> bool) -> Option<usize> {
        let fitting: Vec<usize> = (0..vars.len()).filter(|&var| !vars[var].is_hidden && fits(&vars[var])).collect();
        if fitting.is_empty() { None } else { Some(fitting[self.rng.below(fitting.len())]) }
    }

    /// A variable that may be written: not older than `floor`, for the sake of other streams.
    fn pick_written(&mut self, vars: &[Var], floor: usize) -> Option<usize> {
        let readonly = self.readonly.clone();
        self.pick(vars, |var| var.buf >= floor && !readonly.contains(&var.buf))
    }

    fn coefs(&mut self) -> [i32; 3] {
        [(); 3].map(|()| self.rng.below(9) as i32 - 4)
    }

    /// An operation that any code may hold; buffers below `floor` are only read.
    fn plain(&mut self, vars: &mut Vec<Var>, floor: usize, depth: usize) -> Option<Plain> {
        let x = self.pick(vars, |_| true)?;
        let var = vars[x];
        Some(match self.rng.below(17) {
            0..4 => {
                let y = self.pick(vars, |other| other.has_shape_of(&var))?;
                let coefs = self.coefs();
                Plain::Mix { out: self.fresh(vars, var), coefs, x, y }
            }
            4 | 5 => {
                let into = self.pick_written(vars, floor)?;
                let target = vars[into];
                let fits = |other: &Var| other.has_shape_of(&target) && target.may_be_written_from(other);
                let (x, y) = (self.pick(vars, fits)?, self.pick(vars, fits)?);
                Plain::MixInto { into, coefs: self.coefs(), x, y }
            }
            6 => Plain::CopyNew { out: self.fresh(vars, var), x },
            7 => {
                let into = self.pick_written(vars, floor)?;
                let target = vars[into];
                let x = self.pick(vars, |other| other.has_shape_of(&target) && target.is_disjoint(other))?;
                Plain::Copy { into, x }
            }
            8 => Plain::Fill { into: self.pick_written(vars, floor)?, byte: self.rng.below(256) as u8 },
            9 | 10 if !var.is_split && var.cols > 1 => {
                let from = self.rng.below(var.cols);
                let to = from + 1 + self.rng.below(var.cols - from);
                vars.push(Var { first_col: var.first_col + from, cols: to - from, ..var });
                Plain::Columns { out: vars.len() - 1, x, from, to }
            }
            11 if !var.is_split => {
                vars.push(Var { rows: RowKind::One, ..var });
                Plain::Head { out: vars.len() - 1, x }
            }
            12 if !var.is_split && var.cols.is_multiple_of(2) => {
                vars.push(Var { is_split: true, ..var });
                Plain::Split { out: vars.len() - 1, x }
            }
            13 => {
                let index = self.pick(vars, |_| true)?;
                let rows = vars[index].rows;
                Plain::Gather { out: self.fresh(vars, Var { rows, is_split: false, ..var }), x, index }
            }
            14 => {
                let row = self.pick(vars, |other| other.cols == var.cols)?;
                Plain::AddRow { out: self.fresh(vars, var), x, row }
            }
            15 if self.rng.chance(2) => {
                Plain::SumRows { out: self.fresh(vars, Var { rows: RowKind::One, is_split: false, ..var }), x }
            }
            15 => Plain::ScanRows { out: self.fresh(vars, var), x },
            16 if vars.len() > 3 => {
                vars[x].is_hidden = true;
                Plain::Drop { x }
            }
            _ if depth > 0 && self.rng.chance(4) => self.forked(vars, depth),
            _ => return None,
        })
    }

    fn forked(&mut self, vars: &mut Vec<Var>, depth: usize) -> Plain {
        let is_scope = depth < 2 || self.rng.chance(2);
        let num_sides = if is_scope { 1 + self.rng.below(2) } else { 1 };
        let first = vars.len();
        let mut parts = Vec::new();
        for _ in 0..=num_sides {
            let (floor, begin) = (self.num_bufs, vars.len());
            let mut part = Vec::new();
            for _ in 0..1 + self.rng.below(4) {
                part.extend(self.plain(vars, floor, depth - 1));
            }
            vars[begin..].iter_mut().for_each(|var| var.is_hidden |= true);
            parts.push((part, begin..vars.len()));
        }
        // What the parts made is there after the join, unless they dropped it themselves.
        for (part, made) in &parts {
            let dropped = dropped_by(part);
            for var in made.clone().filter(|var| *var >= first && !dropped.contains(var)) {
                vars[var].is_hidden = false;
            }
        }
        let mut parts: Vec<Vec<Plain>> = parts.into_iter().map(|(part, _)| part).collect();
        let own = parts.pop().unwrap_or_default();
        if is_scope { Plain::Scope { sides: parts, own } } else { Plain::Events { side: parts.swap_remove(0), own } }
    }

    /// A collective now and then, if there are several ranks.
    fn collective(&mut self, frame: &mut Frame) -> Option<Op> {
        if self.num_ranks == 1 || !self.rng.chance(4) {
            return None;
        }
        let x = self.pick(&frame.vars, |_| true)?;
        let var = frame.vars[x];
        let out = self.fresh(&mut frame.vars, Var { is_split: false, ..var });
        let offset = self.rng.below(self.num_ranks);
        Some(if offset == 0 { Op::SumRanks { out, x } } else { Op::OfRank { out, x, offset } })
    }

    /// Fills `frame` with `len` operations of captured code.
    fn captured(&mut self, frame: &mut Frame, len: usize) {
        for _ in 0..len {
            let collective = self.collective(frame);
            frame.ops.extend(collective);
            match self.rng.below(10) {
                0..3 => {
                    let step = self.annotated(frame, 2);
                    self.num_hosts += step.hosts.len();
                    frame.ops.push(Op::Break(Box::new(step)));
                }
                3 => frame.ops.push(Op::EndSegment),
                _ => {
                    let plain = self.plain(&mut frame.vars, 0, 2);
                    frame.ops.extend(plain.map(Op::Plain));
                }
            }
        }
    }

    fn annotated(&mut self, outer: &mut Frame, depth: usize) -> Break {
        let mut args = Vec::new();
        for _ in 0..self.rng.below(4) {
            args.extend(self.pick(&outer.vars, |_| true).filter(|arg| !args.contains(arg)));
        }
        let mut inner = Frame { vars: args.iter().map(|&arg| outer.vars[arg]).collect(), ..Frame::default() };
        if args.is_empty() {
            inner.ops.push(Op::Plain(self.persistent(&mut inner.vars, 0)));
        }
        for _ in 0..1 + self.rng.below(6) {
            let collective = self.collective(&mut inner);
            inner.ops.extend(collective);
            self.body_op(&mut inner, depth);
        }
        let kind = [Kind::Tensor, Kind::Tuple, Kind::Struct][self.rng.below(3)];
        let num_outputs = if kind == Kind::Tensor { 1 } else { self.rng.below(4) };
        let mut outputs = Vec::new();
        for _ in 0..num_outputs {
            let output = match self.pick(&inner.vars, |_| true) {
                Some(output) => output,
                None => {
                    inner.ops.push(Op::Plain(self.persistent(&mut inner.vars, 0)));
                    inner.vars.len() - 1
                }
            };
            outer.vars.push(inner.vars[output]);
            outputs.push((output, outer.vars.len() - 1));
        }
        let num_hosts = if kind == Kind::Tensor { 0 } else { self.rng.below(3) };
        let hosts = (0..num_hosts).map(|_| self.coef(&inner)).collect();
        Break { args, body: inner.ops, outputs, hosts, kind }
    }

    fn coef(&mut self, frame: &Frame) -> Coef {
        match self.rng.below(3) {
            0 if frame.num_locals > 0 => Coef::Local(self.rng.below(frame.num_locals)),
            1 if self.num_hosts > 0 => Coef::Earlier(self.rng.below(self.num_hosts)),
            _ => Coef::Live(self.rng.below(NUM_COEFS)),
        }
    }

    /// Adds an operation to the body of a break.
    fn body_op(&mut self, frame: &mut Frame, depth: usize) {
        let Some(x) = self.pick(&frame.vars, |_| true) else { return };
        let var = frame.vars[x];
        let live = self.rng.below(NUM_COEFS);
        let op = match self.rng.below(14) {
            0 | 1 => {
                let y = self.pick(&frame.vars, |other| other.has_shape_of(&var)).unwrap_or(x);
                let coef = self.coef(frame);
                Op::LiveMix { out: self.fresh(&mut frame.vars, var), coef, x, y }
            }
            2 if self.num_ranks == 1 => {
                let cols = 1 + self.rng.below(6);
                let shape = Var { cols, rows: RowKind::One, is_split: false, ..var };
                Op::LiveUpload { out: self.fresh(&mut frame.vars, shape), coef: live, cols }
            }
            3 => Op::LiveScratch { coef: live, keep: self.rng.chance(2) },
            4 => {
                let y = self.pick(&frame.vars, |other| other.has_shape_of(&var)).unwrap_or(x);
                Op::LiveIf { out: self.fresh(&mut frame.vars, var), coef: live, x, y }
            }
            5 if !self.is_padded => {
                let out = self.fresh(&mut frame.vars, var);
                self.readonly.extend([var.buf, frame.vars[out].buf]);
                Op::LivePick { out, x }
            }
            6 if self.num_ranks == 1 => {
                frame.num_locals += 1;
                Op::ReadBack { x }
            }
            7 if depth > 1 => Op::Break(Box::new(self.annotated(frame, depth - 1))),
            8 => Op::EndSegment,
            _ => match self.plain(&mut frame.vars, 0, 2) {
                Some(plain) => Op::Plain(plain),
                None => return,
            },
        };
        frame.ops.push(op);
    }
}

/// The variables that a part of a fork drops.
fn dropped_by(ops: &[Plain]) -> Vec<usize> {
    let mut dropped = Vec::new();
    for op in ops {
        match op {
            Plain::Drop { x } => dropped.push(*x),
            Plain::Scope { sides, own } => sides.iter().chain([own]).for_each(|part| dropped.extend(dropped_by(part))),
            Plain::Events { side, own } => [side, own].into_iter().for_each(|part| dropped.extend(dropped_by(part))),
            _ => {}
        }
    }
    dropped
}
