//! `causal_conv1d`, `ssd_scan`, `ssm_update`: each against the sequential formula in f64, token by token.

use bcg_kernels::{self as ops, CausalConv1d, SsmInputs, StateSlots};
use bcg_models::state::{LayerState, StateCache, StateLayout};
use bcg_runtime::{BreakableCudaGraph, Context, DType, Device, Eager, Error, Result, Tensor, eager_on_graph};
use half::{bf16, f16};

use super::fixture::{FLOATS, Fixture, Known, assert_close};

/// Padded rows behind those of the sequences, and empty sequences behind the last one.
const PADDING: usize = 3;

/// A batch of sequences with some new tokens each.
pub(super) struct Batch {
    lens: Vec<usize>,
    /// The slot that each sequence reads and the one it writes.
    slots: Vec<(i32, i32)>,
    num_slots: usize,
}

impl Batch {
    /// Gives each sequence slots by its index: every third begins, every fourth keeps nothing. With `in_place` the others
    /// write what they read.
    pub(super) fn new(fixture: &mut Fixture, lens: &[usize], in_place: bool) -> Self {
        let num_slots = 2 * lens.len() + 2;
        let order = fixture.shuffled(num_slots);
        let slots = (0..lens.len()).map(|b| {
            let read = if b % 3 == 1 { -1 } else { order[2 * b] as i32 };
            let write = if b % 4 == 2 { -1 } else { order[2 * b + 1] as i32 };
            (read, if in_place && read >= 0 && write >= 0 { read } else { write })
        });
        Self { lens: lens.to_vec(), slots: slots.collect(), num_slots }
    }

    fn rows(&self) -> usize {
        self.lens.iter().sum()
    }

    /// `[B + 1]`, empty sequences included.
    fn starts(&self, fixture: &Fixture) -> Tensor {
        let mut starts = vec![0];
        self.lens.iter().for_each(|len| starts.push(starts[starts.len() - 1] + *len as i32));
        starts.resize(starts.len() + PADDING, self.rows() as i32);
        fixture.ints(&starts)
    }

    /// Padding has no slots.
    fn state_slots(&self, fixture: &Fixture) -> StateSlots {
        let padded = |of: fn(&(i32, i32)) -> i32| {
            let mut slots: Vec<i32> = self.slots.iter().map(of).collect();
            slots.resize(slots.len() + PADDING, -1);
            fixture.ints(&slots)
        };
        StateSlots { read: padded(|slots| slots.0), write: padded(|slots| slots.1) }
    }

    /// States of numbers in -1..1 where a sequence reads, and of NaN elsewhere.
    fn states(&self, fixture: &mut Fixture, shape: &[usize], dtype: DType) -> Known {
        let len: usize = shape.iter().product();
        let mut values = vec![f64::NAN; self.num_slots * len];
        for (read, _) in &self.slots {
            if *read >= 0 {
                values[*read as usize * len..][..len].copy_from_slice(&fixture.numbers(len));
            }
        }
        let mut all = vec![self.num_slots];
        all.extend(shape);
        fixture.floats(&all, dtype, &values)
    }

    /// The rows of each sequence, with its index.
    fn sequences<'a>(&'a self, values: &'a [f64], width: usize) -> impl Iterator<Item = (usize, &'a [f64])> {
        let mut end = 0;
        self.lens.iter().enumerate().map(move |(b, len)| {
            end += len * width;
            (b, &values[end - len * width..end])
        })
    }

    /// Asserts that the state of each sequence that keeps one is as expected, and that every other slot has the bits that
    /// it had.
    fn check_states(
        &self,
        what: &str,
        before: &Before,
        after: &Before,
        expected: &[Vec<f64>],
        ulps: f64,
        dtype: DType,
    ) {
        let len = after.bits.len() / self.num_slots;
        for slot in 0..self.num_slots {
            let range = slot * len..(slot + 1) * len;
            let writer = (0..self.lens.len()).find(|b| self.slots[*b].1 == slot as i32 && self.lens[*b] > 0);
            match writer {
                None => assert_eq!(after.bits[range.clone()], before.bits[range], "{what}: slot {slot} was touched"),
                Some(b) => assert_close(what, &after.values[range], &expected[b], dtype, ulps, 1.0),
            }
        }
    }
}

/// What a state tensor holds.
struct Before {
    bits: Vec<u32>,
    values: Vec<f64>,
}

fn snapshot(device: &Device, tensor: &Tensor) -> Before {
    let error = "the states are read";
    let bits: Vec<u32> = match tensor.dtype() {
        DType::Bf16 => device.read::<bf16>(tensor).expect(error).iter().map(|v| v.to_bits().into()).collect(),
        DType::F16 => device.read::<f16>(tensor).expect(error).iter().map(|v| v.to_bits().into()).collect(),
        _ => device.read::<f32>(tensor).expect(error).iter().map(|v| v.to_bits()).collect(),
    };
    let value = |bits: &u32| match tensor.dtype() {
        DType::Bf16 => f64::from(bf16::from_bits(*bits as u16).to_f32()),
        DType::F16 => f64::from(f16::from_bits(*bits as u16).to_f32()),
        _ => f64::from(f32::from_bits(*bits)),
    };
    Before { values: bits.iter().map(value).collect(), bits }
}

/// Numbers in -1..1 in valid rows, NaN in padded ones and in the columns around; `lie` says how the rows lie: dense, at
/// addresses that are multiples of 16 bytes or not.
fn padded_rows(fixture: &mut Fixture, rows: usize, columns: usize, dtype: DType, lie: usize) -> Known {
    let (left, right) = [(0, 0), (3, 5), (8, columns.next_multiple_of(8) - columns + 8)][lie];
    let mut wide = vec![];
    for _ in 0..rows {
        wide.extend(vec![f64::NAN; left]);
        wide.extend(fixture.numbers(columns));
        wide.extend(vec![f64::NAN; right]);
    }
    wide.resize((rows + PADDING) * (left + columns + right), f64::NAN);
    let known = fixture.floats(&[rows + PADDING, left + columns + right], dtype, &wide);
    Known {
        tensor: known.tensor.columns(left..left + columns).expect("a column range"),
        values: known.values.into_iter().filter(|v| !v.is_nan()).collect(),
    }
}

/// The rows before the padding.
fn valid(fixture: &mut Fixture, out: &Tensor, rows: usize) -> Vec<f64> {
    let mut values = fixture.read(out);
    values.truncate(rows * out.dim(1));
    values
}

fn silu(v: f64) -> f64 {
    v / (1.0 + (-v).exp())
}

/// A convolution's weights.
struct Conv {
    weight: Known,
    bias: Option<Known>,
    channels: usize,
    kernel: usize,
}

impl Conv {
    fn new(fixture: &mut Fixture, channels: usize, kernel: usize, has_bias: bool, dtype: DType) -> Self {
        let weight = fixture.random(&[channels, kernel], dtype);
        let bias = has_bias.then(|| fixture.random(&[channels], dtype));
        Self { weight, bias, channels, kernel }
    }

    /// The outputs of a sequence's rows, and the inputs that it keeps, from those that it had.
    fn expected(&self, x: &[f64], before: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
        let (channels, kernel, past) = (self.channels, self.kernel, self.kernel - 1);
        let rows = x.len() / channels;
        let input = |t: isize, c: usize| match usize::try_from(t) {
            Ok(t) => x[t * channels + c],
            Err(_) => before.map_or(0.0, |before| before[c * past + (t + past as isize) as usize]),
        };
        let mut out = vec![];
        for t in 0..rows as isize {
            for c in 0..channels {
                let taps =
                    (0..kernel).map(|k| self.weight.values[c * kernel + k] * input(t - past as isize + k as isize, c));
                out.push(silu(self.bias.as_ref().map_or(0.0, |bias| bias.values[c]) + taps.sum::<f64>()));
            }
        }
        let last = |c| (0..past).map(move |i| (c, rows as isize - past as isize + i as isize));
        (out, (0..channels).flat_map(last).map(|(c, t)| input(t, c)).collect())
    }

    /// Runs a batch, and compares outputs and states with the formula.
    fn check(&self, fixture: &mut Fixture, batch: &Batch, lie: usize, is_decode: bool) {
        let (device, dtype) = (fixture.device.clone(), self.weight.tensor.dtype());
        let x = padded_rows(fixture, batch.rows(), self.channels, dtype, lie);
        let state = batch.states(fixture, &[self.channels, self.kernel - 1], dtype);
        let (before, starts) = (snapshot(&device, &state.tensor), batch.starts(fixture));
        let input = CausalConv1d {
            x: &x.tensor,
            weight: &self.weight.tensor,
            bias: self.bias.as_ref().map(|bias| &bias.tensor),
            state: &state.tensor,
            slots: &batch.state_slots(fixture),
            cu_seqlens_q: (!is_decode).then_some(&starts),
        };
        let out = fixture.run(|cx| ops::causal_conv1d(cx, &input));
        let len = self.channels * (self.kernel - 1);
        let (mut outputs, mut states) = (vec![], vec![]);
        for (b, rows) in batch.sequences(&x.values, self.channels) {
            let read = usize::try_from(batch.slots[b].0).ok();
            let (out, state) = self.expected(rows, read.map(|slot| &before.values[slot * len..][..len]));
            outputs.extend(out);
            states.push(state);
        }
        assert_close("causal_conv1d", &valid(fixture, &out, batch.rows()), &outputs, dtype, 2.0, 1.0);
        let after = snapshot(&device, &state.tensor);
        batch.check_states("inputs that are kept", &before, &after, &states, 0.0, dtype);
    }
}

/// Lengths of sequences: one, shorter than the convolution, empty ones between others, some long ones.
const LENS: [&[usize]; 3] = [&[1], &[2, 3, 1, 4, 1], &[7, 1, 0, 0, 2, 40, 3, 1, 19, 2]];

/// Each row is convolved with those before it in its own sequence, and with the inputs in the slot that it reads; the last
/// inputs go to the slot that it writes, and no other slot changes.
pub(super) fn conv1d_continues_each_sequence(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for (channels, kernel, has_bias) in [(24, 4, true), (10, 3, false), (16, 2, true), (1032, 4, true)] {
            let conv = Conv::new(&mut fixture, channels, kernel, has_bias, dtype);
            for (lens, lie) in LENS.iter().zip([0, 1, 2]).chain(LENS.iter().zip([2, 0, 1])) {
                let batch = Batch::new(&mut fixture, lens, false);
                conv.check(&mut fixture, &batch, lie, false);
            }
        }
    }
}

/// So many rows and channels that a thread slides down several rows, with sequences that begin and end among them.
pub(super) fn conv1d_of_many_rows_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    let conv = Conv::new(&mut fixture, 4096, 4, true, DType::Bf16);
    let batch = Batch::new(&mut fixture, &[500, 1, 1, 0, 2, 3, 290, 4, 5, 6, 7, 481], false);
    conv.check(&mut fixture, &batch, 0, false);
}

/// One token of each sequence, in the same slot or from one to another; padded rows touch no slot.
pub(super) fn conv1d_takes_one_token_of_each_sequence(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for (channels, kernel, lie) in [(24, 4, 0), (10, 3, 1), (1032, 2, 2)] {
            let conv = Conv::new(&mut fixture, channels, kernel, true, dtype);
            for in_place in [false, true] {
                let batch = Batch::new(&mut fixture, &[1; 7], in_place);
                conv.check(&mut fixture, &batch, lie, true);
            }
        }
    }
}

/// The sizes of a scan: heads, dimensions of a head, state size, groups.
pub(super) type Sizes = (usize, usize, usize, usize);

/// A scan's parameters.
pub(super) struct Scan {
    a_log: Known,
    d: Known,
    dt_bias: Known,
    dt_limits: (f32, f32),
    sizes: Sizes,
    dtype: DType,
}

impl Scan {
    pub(super) fn new(fixture: &mut Fixture, sizes: Sizes, dtype: DType) -> Self {
        let mut of_heads = || fixture.random(&[sizes.0], dtype);
        let (a_log, d, dt_bias) = (of_heads(), of_heads(), of_heads());
        Self { a_log, d, dt_bias, dt_limits: (0.0, f32::INFINITY), sizes, dtype }
    }

    /// The columns of x, B, C and the time step.
    pub(super) fn widths(&self) -> [usize; 4] {
        let (heads, head_dim, state_size, groups) = self.sizes;
        [heads * head_dim, groups * state_size, groups * state_size, heads]
    }

    pub(super) fn inputs<'a>(
        &'a self,
        tensors: [&'a Tensor; 4],
        state: &'a Tensor,
        slots: &'a StateSlots,
    ) -> SsmInputs<'a> {
        let [x, b, c, dt] = tensors;
        let (a_log, d, dt_bias) = (&self.a_log.tensor, &self.d.tensor, &self.dt_bias.tensor);
        SsmInputs { x, b, c, dt, a_log, d, dt_bias, dt_limits: self.dt_limits, state, slots }
    }

    /// Takes the state of one sequence over one token, in f64.
    fn advance(&self, [x, b, c, dt]: [&[f64]; 4], h: &mut [f64]) -> Vec<f64> {
        let (heads, head_dim, state_size, groups) = self.sizes;
        let (least, most) = (f64::from(self.dt_limits.0), f64::from(self.dt_limits.1));
        let mut out = vec![];
        for (head, dt) in dt.iter().enumerate() {
            let raw = dt + self.dt_bias.values[head];
            let step = (raw.max(0.0) + (-raw.abs()).exp().ln_1p()).clamp(least, most);
            let decay = (-step * self.a_log.values[head].exp()).exp();
            let group = head / (heads / groups) * state_size;
            for p in head * head_dim..(head + 1) * head_dim {
                let mut sum = self.d.values[head] * x[p];
                for n in 0..state_size {
                    let h = &mut h[p * state_size + n];
                    *h = decay * *h + step * x[p] * b[group + n];
                    sum += c[group + n] * *h;
                }
                out.push(sum);
            }
        }
        out
    }

    /// Runs a batch, and compares outputs and states with the formula.
    pub(super) fn check(&self, fixture: &mut Fixture, batch: &Batch, state_dtype: DType, lie: usize, is_decode: bool) {
        let (device, rows) = (fixture.device.clone(), batch.rows());
        let inputs = self.widths().map(|width| padded_rows(fixture, rows, width, self.dtype, lie));
        let (heads, head_dim, state_size, _) = self.sizes;
        let state = batch.states(fixture, &[heads, head_dim, state_size], state_dtype);
        let (before, starts, slots) =
            (snapshot(&device, &state.tensor), batch.starts(fixture), batch.state_slots(fixture));
        let input = self.inputs(inputs.each_ref().map(|known| &known.tensor), &state.tensor, &slots);
        let out = fixture.run(|cx| match is_decode {
            true => ops::ssm_update(cx, &input),
            false => ops::ssd_scan(cx, &input, &starts),
        });
        let len = heads * head_dim * state_size;
        let (mut outputs, mut states, mut t) = (vec![], vec![], 0);
        for (b, tokens) in batch.lens.iter().enumerate() {
            let read = usize::try_from(batch.slots[b].0).ok();
            let mut h = read.map_or(vec![0.0; len], |slot| before.values[slot * len..][..len].to_vec());
            for row in t..t + tokens {
                let of_row = |i: usize| &inputs[i].values[row * self.widths()[i]..][..self.widths()[i]];
                outputs.extend(self.advance([0, 1, 2, 3].map(of_row), &mut h));
            }
            t += tokens;
            states.push(h);
        }
        let what = format!("{:?} at {lie}", self.sizes);
        // Computed in f32 and rounded once.
        let (ulps, floor) = if self.dtype == DType::F32 { (4.0, (state_size as f64).sqrt()) } else { (1.1, 1.0) };
        assert_close(&what, &valid(fixture, &out, rows), &outputs, self.dtype, ulps, floor);
        let after = snapshot(&device, &state.tensor);
        // Kernels on tensor cores split what enters a state into two bf16, which is 2^-16 off at most.
        let ulps = match (self.dtype, state_dtype) {
            (DType::Bf16, DType::F32) => 128.0,
            (_, DType::F32) => 8.0,
            _ => 1.1,
        };
        batch.check_states(&what, &before, &after, &states, ulps, state_dtype);
    }
}

/// Sizes of no whole words, of several words a lane, of groups of one head and of all heads, of published models.
const SIZES: [Sizes; 6] =
    [(4, 8, 16, 2), (3, 5, 7, 1), (2, 6, 40, 2), (1, 33, 256, 1), (8, 64, 64, 2), (4, 64, 128, 1)];

/// The recurrence of each sequence goes on from the slot that it reads, in chunks as short as one token, and ends in the
/// slot that it writes; no other slot changes.
pub(super) fn ssd_scan_continues_each_sequence(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (dtype, state_dtype) in FLOATS.iter().flat_map(|dtype| [(*dtype, DType::F32), (*dtype, DType::Bf16)]) {
        for (sizes, lie) in SIZES.into_iter().zip([0, 1, 2].into_iter().cycle()) {
            let scan = Scan::new(&mut fixture, sizes, dtype);
            for lens in LENS {
                let batch = Batch::new(&mut fixture, lens, false);
                scan.check(&mut fixture, &batch, state_dtype, lie, false);
            }
        }
    }
}

/// Sequences longer than the chunks that a kernel may cut them into.
pub(super) fn ssd_scan_of_long_sequences_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        let scan = Scan::new(&mut fixture, (4, 64, 128, 2), dtype);
        let batch = Batch::new(&mut fixture, &[64, 300, 1, 129, 257], false);
        scan.check(&mut fixture, &batch, DType::F32, 0, false);
    }
}

/// Time steps are limited from below and from above, and large ones are not lost in the exponential.
pub(super) fn time_steps_stay_within_their_limits(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for dt_limits in [(0.6, 0.7), (0.0, 0.5), (1.5, f32::INFINITY)] {
            let scan = Scan { dt_limits, ..Scan::new(&mut fixture, (8, 64, 64, 2), dtype) };
            for is_decode in [false, true] {
                let batch = Batch::new(&mut fixture, &[1; 5], false);
                scan.check(&mut fixture, &batch, DType::F32, 0, is_decode);
            }
        }
        let mut scan = Scan::new(&mut fixture, (4, 8, 16, 2), dtype);
        scan.dt_bias = fixture.floats(&[4], dtype, &[-100.0, -15.0, 19.0, 100.0]);
        scan.a_log = fixture.floats(&[4], dtype, &[0.0, 3.0, -2.0, -4.0]);
        let batch = Batch::new(&mut fixture, &[1; 5], false);
        scan.dt_limits = (0.0, 2.0);
        scan.check(&mut fixture, &batch, DType::F32, 0, true);
        scan.check(&mut fixture, &batch, DType::F32, 0, false);
    }
}

/// One token of each sequence, in the same slot or from one to another; padded rows touch no slot.
pub(super) fn ssm_update_takes_one_token_of_each_sequence(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (dtype, state_dtype) in FLOATS.iter().flat_map(|dtype| [(*dtype, DType::F32), (*dtype, DType::Bf16)]) {
        for (sizes, lie) in SIZES.into_iter().zip([0, 1, 2].into_iter().cycle()) {
            let scan = Scan::new(&mut fixture, sizes, dtype);
            for in_place in [false, true] {
                let batch = Batch::new(&mut fixture, &[1; 7], in_place);
                scan.check(&mut fixture, &batch, state_dtype, lie, true);
            }
        }
    }
}

/// A convolution with a state, in a break.
#[eager_on_graph]
fn convolve(
    cx: &mut Eager<'_, ()>,
    x: &Tensor,
    weight: &Tensor,
    state: &LayerState,
    slots: &StateSlots,
) -> Result<Tensor> {
    let (bias, cu_seqlens_q) = (None, None);
    ops::causal_conv1d(cx, &CausalConv1d { x, weight, bias, state: &state.conv, slots, cu_seqlens_q })
}

/// A replay whose states were made anew since the capture is refused, whether a break or a segment has them.
pub(super) fn replays_on_older_states_are_refused(device: &Device) {
    let layout = StateLayout { layers: 1, conv: [8, 3], ssm: [2, 4, 4], ssm_dtype: DType::F32 };
    for is_break in [true, false] {
        let mut fixture = Fixture::new(device);
        let mut cache = StateCache::new(device, DType::F32, Some(&layout), 2).expect("states");
        let (x, weight) = (fixture.random(&[1, 8], DType::F32).tensor, fixture.random(&[8, 4], DType::F32).tensor);
        let slots = StateSlots { read: fixture.ints(&[0]), write: fixture.ints(&[1]) };
        let state = cache.layers()[0].clone();
        let forward = move |cx: &mut Context<'_, ()>| match is_break {
            true => convolve(cx, &x, &weight, &state, &slots),
            false => {
                let (bias, cu_seqlens_q) = (None, None);
                let (x, weight, state, slots) = (&x, &weight, &state.conv, &slots);
                ops::causal_conv1d(cx, &CausalConv1d { x, weight, bias, state, slots, cu_seqlens_q })
            }
        };
        let mut graph = BreakableCudaGraph::new("states");
        graph.capture(&mut fixture.runner, &(), forward).expect("a capture");
        graph.replay(&mut fixture.runner, &()).expect("a replay");
        fixture.runner.synchronize().expect("the replay ends");
        cache.recreate(device).expect("other states");
        let error = graph.replay(&mut fixture.runner, &()).expect_err("the states are older");
        assert!(matches!(error.root(), Error::Generation { .. }), "break: {is_break}: {error}");
        fixture.runner.synchronize().expect("nothing runs");
        let new = snapshot(device, &cache.layers()[0].conv);
        assert!(new.bits.iter().all(|bits| *bits == 0), "break: {is_break}");
    }
}
