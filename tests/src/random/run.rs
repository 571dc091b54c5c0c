//! Runs a program on a device: eagerly, under capture, at replay. The code is the same for all three.

use std::sync::Arc;

use bcg_runtime::{
    Bridge, Context, DType, Device, Eager, Event, Freeze, Live, LiveBatch, OpStream, Result, Rows, Stream, Tensor,
    eager_on_graph,
};

use super::collectives::{of_rank, sum_ranks};
use super::kernels::{add_row, gather, mix, scan_rows, sum_rows};
use super::program::{Break, Coef, Kind, NUM_COEFS, Op, PERSISTENT_COLS, Plain, Program, ROWS_MAX};
use super::rng::Rng;

/// The live batch of a random program.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub(super) coefs: [i32; NUM_COEFS],
    pub(super) rows: Option<Rows>,
    /// Picks between an argument and a copy take the argument.
    pub(super) picks_argument: bool,
}

impl LiveBatch for Batch {
    fn rows(&self) -> Option<Rows> {
        self.rows
    }
}

impl Batch {
    pub(super) fn random(rng: &mut Rng, program: &Program, size: usize) -> Self {
        let rows = program.is_padded.then(|| Rows { valid: rng.below(size + 1), padded: size });
        let coefs = [(); NUM_COEFS].map(|()| rng.below(13) as i32 - 5);
        Self { coefs, rows, picks_argument: rng.chance(2) }
    }
}

/// What a run leaves: the variables that were not dropped, host values, persistent tensors.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) tensors: Vec<Vec<i32>>,
    pub(super) hosts: Vec<i32>,
    pub(super) persistent: Vec<Vec<i32>>,
}

/// What [`Plain::Fill`] writes.
pub(super) fn fill_value(byte: u8) -> i32 {
    i32::from_ne_bytes([byte; 4])
}

/// What [`Op::LiveUpload`] writes.
pub(super) fn upload_data(coef: i32, cols: usize) -> Vec<i32> {
    (0..cols as i32).map(|c| coef * 10 + c).collect()
}

/// What every run of a program uses.
#[derive(Debug)]
pub(super) struct World {
    pub(super) persistent: Vec<Tensor>,
    stream: Arc<Stream>,
    forked: Event,
    done: Event,
}

impl World {
    pub(super) fn new(device: &Device) -> Self {
        let make = |cols| device.zeros(&[ROWS_MAX, cols], DType::I32).expect("a persistent tensor");
        let event = || Event::new(device).expect("an event");
        let stream = Arc::new(Stream::new(device, "of the program").expect("a stream"));
        Self { persistent: PERSISTENT_COLS.map(make).into(), stream, forked: event(), done: event() }
    }
}

/// The variables of one frame.
struct Frame<'a> {
    world: &'a World,
    rows: usize,
    vars: Vec<Option<Tensor>>,
}

/// The forward of a program on `rows` rows.
pub(super) fn forward(
    cx: &mut Context<'_, Batch>,
    program: &Arc<Program>,
    world: &Arc<World>,
    rows: usize,
) -> Result<(Vec<Tensor>, Vec<Live<i32>>)> {
    let mut frame = Frame { world, rows, vars: Vec::new() };
    let mut hosts = Vec::new();
    for op in &program.ops {
        match op {
            Op::Plain(plain) => frame.plain(cx, plain)?,
            Op::EndSegment => cx.break_graph()?,
            Op::Break(step) => call(cx, &mut frame, step, world, &mut hosts)?,
            Op::SumRanks { .. } | Op::OfRank { .. } => frame.collective(cx, op)?,
            live => panic!("{live:?} stands in captured code"),
        }
    }
    Ok((frame.vars.into_iter().flatten().collect(), hosts))
}

/// Calls one of the annotated functions.
fn call(
    cx: &mut Context<'_, Batch>,
    frame: &mut Frame<'_>,
    step: &Break,
    world: &Arc<World>,
    hosts: &mut Vec<Live<i32>>,
) -> Result<()> {
    let args: Vec<Tensor> = step.args.iter().map(|&arg| frame.var(arg).clone()).collect();
    let (shared, rows) = (Arc::new(step.clone()), frame.rows);
    let (tensors, returned) = match step.kind {
        Kind::Tensor => (vec![returns_tensor(cx, &shared, world, rows, &args, hosts)?], Vec::new()),
        Kind::Tuple => returns_tuple(cx, &shared, world, rows, args, hosts)?,
        Kind::Struct => {
            let Outputs { rest, first, hosts: [a, b] } = returns_struct(cx, &shared, world, rows, &args, hosts)?;
            (first.into_iter().chain(rest).collect(), [a, b].into_iter().take(step.hosts.len()).collect())
        }
    };
    step.outputs.iter().zip(tensors).for_each(|((_, outside), tensor)| frame.set(*outside, tensor));
    hosts.extend(returned);
    Ok(())
}

#[eager_on_graph]
fn returns_tensor(
    cx: &mut Eager<'_, Batch>,
    step: &Arc<Break>,
    world: &Arc<World>,
    rows: usize,
    args: &Vec<Tensor>,
    hosts: &Vec<Live<i32>>,
) -> Result<Tensor> {
    let (mut tensors, _) = body(cx, step, world, rows, args, hosts)?;
    Ok(tensors.swap_remove(0))
}

#[eager_on_graph]
fn returns_tuple(
    cx: &mut Eager<'_, Batch>,
    step: &Arc<Break>,
    world: &Arc<World>,
    rows: usize,
    args: Vec<Tensor>,
    hosts: &Vec<Live<i32>>,
) -> Result<(Vec<Tensor>, Vec<Live<i32>>)> {
    let (tensors, values) = body(cx, step, world, rows, &args, hosts)?;
    Ok((tensors, values.into_iter().map(Live::new).collect()))
}

#[derive(Freeze, Bridge)]
struct Outputs {
    rest: Vec<Tensor>,
    first: Option<Tensor>,
    hosts: [Live<i32>; 2],
}

#[eager_on_graph]
fn returns_struct(
    cx: &mut Eager<'_, Batch>,
    step: &Arc<Break>,
    world: &Arc<World>,
    rows: usize,
    args: &Vec<Tensor>,
    hosts: &Vec<Live<i32>>,
) -> Result<Outputs> {
    let (tensors, values) = body(cx, step, world, rows, args, hosts)?;
    let mut tensors = tensors.into_iter();
    let value = |index: usize| Live::new(values.get(index).copied().unwrap_or(0));
    Ok(Outputs { first: tensors.next(), rest: tensors.collect(), hosts: [value(0), value(1)] })
}

/// What the body of a break computes besides tensors.
struct Hosts<'a> {
    earlier: &'a Vec<Live<i32>>,
    locals: Vec<i32>,
    /// Values that nested breaks returned, which count as earlier ones.
    nested: Vec<Live<i32>>,
}

impl Hosts<'_> {
    fn get(&self, cx: &Eager<'_, Batch>, coef: Coef) -> i32 {
        match coef {
            Coef::Live(index) => cx.live().coefs[index],
            Coef::Local(index) => self.locals[index],
            Coef::Earlier(index) => {
                let nested = index.checked_sub(self.earlier.len()).map(|index| &self.nested[index]);
                nested.unwrap_or_else(|| &self.earlier[index]).get(cx)
            }
        }
    }
}

/// Runs the body of a break; returns its outputs.
fn body(
    cx: &mut Eager<'_, Batch>,
    step: &Break,
    world: &Arc<World>,
    rows: usize,
    args: &[Tensor],
    earlier: &Vec<Live<i32>>,
) -> Result<(Vec<Tensor>, Vec<i32>)> {
    let mut frame = Frame { world, rows, vars: args.iter().cloned().map(Some).collect() };
    let mut hosts = Hosts { earlier, locals: Vec::new(), nested: Vec::new() };
    let mut kept = Vec::new();
    for op in &step.body {
        match op {
            Op::Plain(plain) => frame.plain(cx, plain)?,
            Op::EndSegment => cx.break_graph()?,
            Op::Break(nested) => call_nested(cx, &mut frame, nested, world, &mut hosts)?,
            Op::SumRanks { .. } | Op::OfRank { .. } => frame.collective(cx, op)?,
            Op::LiveScratch { coef, keep } => {
                let bytes = 64 * (1 + cx.live().coefs[*coef].unsigned_abs() as usize * 5);
                let scratch = cx.empty(&[bytes], DType::U8)?;
                cx.fill_bytes(&scratch, 0xAB)?;
                kept.extend(keep.then_some(scratch));
            }
            live => live_op(cx, &mut frame, &mut hosts, live)?,
        }
    }
    let outputs = step.outputs.iter().map(|(inside, _)| frame.var(*inside).clone()).collect();
    let values = step.hosts.iter().map(|&host| hosts.get(cx, host)).collect();
    Ok((outputs, values))
}

fn call_nested(
    cx: &mut Eager<'_, Batch>,
    frame: &mut Frame<'_>,
    step: &Break,
    world: &Arc<World>,
    hosts: &mut Hosts<'_>,
) -> Result<()> {
    // The nested break gets copies of the host values, since it takes a list of its own.
    let values = hosts.earlier.iter().chain(&hosts.nested).map(|value| value.get(cx));
    let mut list: Vec<Live<i32>> = values.map(Live::new).collect();
    let before = list.len();
    call(cx, frame, step, world, &mut list)?;
    hosts.nested.extend(list.drain(before..));
    Ok(())
}

fn live_op(cx: &mut Eager<'_, Batch>, frame: &mut Frame<'_>, hosts: &mut Hosts<'_>, op: &Op) -> Result<()> {
    match *op {
        Op::LiveMix { out, coef, x, y } => {
            let a = hosts.get(cx, coef);
            frame.mix(cx, out, [a, 1, 0], x, y)
        }
        Op::LiveUpload { out, coef, cols } => {
            let tensor = cx.empty(&[1, cols], DType::I32)?;
            let data = upload_data(cx.live().coefs[coef], cols);
            cx.upload(&tensor, &data)?;
            frame.set(out, tensor);
            Ok(())
        }
        Op::LiveIf { out, coef, x, y } if cx.live().coefs[coef] > 0 => {
            // Other kernels, and scratch memory before the output.
            let scratch = cx.empty(frame.var(x).shape(), DType::I32)?;
            mix(cx, [1, 0, 0], frame.var(x), frame.var(y), &scratch)?;
            let tensor = cx.empty(scratch.shape(), DType::I32)?;
            mix(cx, [3, 1, 0], &scratch, frame.var(y), &tensor)?;
            frame.set(out, tensor);
            Ok(())
        }
        Op::LiveIf { out, x, y, .. } => frame.mix(cx, out, [2, 1, 5], x, y),
        Op::LivePick { out, x } if cx.live().picks_argument => {
            let x = frame.var(x).clone();
            frame.set(out, x);
            Ok(())
        }
        Op::LivePick { out, x } => frame.plain(cx, &Plain::CopyNew { out, x }),
        Op::ReadBack { x } => {
            let values = cx.read::<i32>(frame.var(x))?;
            hosts.locals.push(values.into_iter().fold(0, i32::wrapping_add));
            Ok(())
        }
        Op::Plain(_) | Op::EndSegment | Op::Break(_) | Op::LiveScratch { .. } => Ok(()),
        Op::SumRanks { .. } | Op::OfRank { .. } => Ok(()),
    }
}

impl Frame<'_> {
    fn var(&self, index: usize) -> &Tensor {
        self.vars[index].as_ref().expect("a variable that is there")
    }

    fn set(&mut self, index: usize, tensor: Tensor) {
        if self.vars.len() <= index {
            self.vars.resize(index + 1, None);
        }
        self.vars[index] = Some(tensor);
    }

    fn mix(&mut self, cx: &mut OpStream, out: usize, coefs: [i32; 3], x: usize, y: usize) -> Result<()> {
        let tensor = cx.empty(self.var(x).shape(), DType::I32)?;
        mix(cx, coefs, self.var(x), self.var(y), &tensor)?;
        self.set(out, tensor);
        Ok(())
    }

    fn collective(&mut self, cx: &mut OpStream, op: &Op) -> Result<()> {
        let (out, tensor) = match *op {
            Op::SumRanks { out, x } => (out, sum_ranks(cx, self.var(x))?),
            Op::OfRank { out, x, offset } => (out, of_rank(cx, self.var(x), offset)?),
            _ => return Ok(()),
        };
        self.set(out, tensor);
        Ok(())
    }

    fn plain_all(&mut self, cx: &mut OpStream, ops: &[Plain]) -> Result<()> {
        ops.iter().try_for_each(|op| self.plain(cx, op))
    }

    fn plain(&mut self, cx: &mut OpStream, op: &Plain) -> Result<()> {
        let (out, tensor) = match op {
            Plain::Persistent { out, number } => (*out, self.world.persistent[*number].rows(0..self.rows)?),
            Plain::Mix { out, coefs, x, y } => return self.mix(cx, *out, *coefs, *x, *y),
            Plain::MixInto { into, coefs, x, y } => {
                return mix(cx, *coefs, self.var(*x), self.var(*y), self.var(*into));
            }
            Plain::CopyNew { out, x } => {
                let tensor = cx.empty(self.var(*x).shape(), DType::I32)?;
                cx.copy(&tensor, self.var(*x))?;
                (*out, tensor)
            }
            Plain::Copy { into, x } => return cx.copy(self.var(*into), self.var(*x)),
            Plain::Fill { into, byte } => return cx.fill_bytes(self.var(*into), *byte),
            Plain::Columns { out, x, from, to } => (*out, self.var(*x).columns(*from..*to)?),
            Plain::Head { out, x } => (*out, self.var(*x).rows(0..1)?),
            Plain::Split { out, x } => {
                let x = self.var(*x);
                (*out, x.reshape(&[x.dim(0), 2, x.dim(1) / 2])?)
            }
            Plain::Gather { out, x, index } => (*out, gather(cx, self.var(*x), self.var(*index))?),
            Plain::AddRow { out, x, row } => (*out, add_row(cx, self.var(*x), self.var(*row))?),
            Plain::SumRows { out, x } => (*out, sum_rows(cx, self.var(*x))?),
            Plain::ScanRows { out, x } => (*out, scan_rows(cx, self.var(*x))?),
            Plain::Drop { x } => {
                self.vars[*x] = None;
                return Ok(());
            }
            Plain::Scope { sides, own } => return self.scope(cx, sides, own),
            Plain::Events { side, own } => return self.events(cx, side, own),
        };
        self.set(out, tensor);
        Ok(())
    }

    fn scope(&mut self, cx: &mut OpStream, sides: &[Vec<Plain>], own: &[Plain]) -> Result<()> {
        cx.scope(|cx| {
            for ops in sides {
                let side = cx.side_stream("side")?;
                cx.on(&side, |cx| self.plain_all(cx, ops))?;
            }
            self.plain_all(cx, own)
        })
    }

    fn events(&mut self, cx: &mut OpStream, side: &[Plain], own: &[Plain]) -> Result<()> {
        let world = self.world;
        cx.record(&world.forked)?;
        cx.on_stream(&world.stream, |cx| {
            cx.wait(&world.forked)?;
            self.plain_all(cx, side)?;
            cx.record(&world.done)
        })?;
        self.plain_all(cx, own)?;
        cx.wait(&world.done)
    }
}
