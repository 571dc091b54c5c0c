//! Times the algorithms of the matrix products that were seen, and keeps the fastest.
//!
//! - It runs on a stream and on memory of its own: random factors, since zeros make a GPU look faster than it is.
//! - Weights are cold, as they are in a model: each launch takes the next copy of the weight, and all copies together
//!   are larger than the second-level cache.
//! - All algorithms of a product are launched in turn without waiting in between, so that the GPU never waits for the
//!   host; those that are far behind after the first turn are left out of the others.
//!
//! Time and memory (half of what is free) are bounded: what does not fit stays as the heuristics chose it.

use std::cell::Cell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use half::{bf16, f16};

use super::super::traits::{
    EventBackend, EventHandle, Matmul, MatmulPlan, MatmulShape, MemoryBackend, StreamBackend, StreamHandle,
};
use super::CudaBackend;
use super::cublaslt::{Descriptors, Heuristic};
use super::matmul::{Known, State, WORKSPACE_BYTES_MAX};
use crate::device::traits::{MatmulTuning, TunedMatmul};
use crate::{DType, DevicePtr, Result};

/// Algorithms that are timed for each product.
const ALGORITHMS_MAX: usize = 8;
/// Turns whose times count, at least and at most; short products take more, to see through their noise.
const TURNS: [usize; 2] = [4, 12];
/// Enough turns when those of one algorithm took this long together, in milliseconds.
const TURNS_MS: f32 = 2.0;
/// An algorithm that took longer than the fastest by this factor in the first turn is dropped.
const HOPELESS: f32 = 1.4;
/// A later algorithm is chosen only if it takes less than this part of the first one's time, less [`MARGIN_MS`].
const WORTHWHILE: f32 = 0.97;
/// What two events may add to the time of one algorithm and not to that of another, in milliseconds: in a graph, an
/// algorithm of two kernels starts the second one sooner. Measured on an H200 (`benches/src/bin/matmul.rs`).
const MARGIN_MS: f32 = 0.0005;
/// Copies of a weight together take at least this much: three times the cache of an H200.
const COLD_BYTES: usize = 160 << 20;
/// Products that are not timed after this long stay as they are.
const TIME_MAX: Duration = Duration::from_secs(20);
/// Random values that scratch memory repeats.
const NUM_RANDOM: usize = 1 << 20;

impl CudaBackend {
    /// See [`MatmulBackend::tune_matmuls`](super::super::traits::MatmulBackend::tune_matmuls).
    pub(super) fn tune(&self, rows: &[usize], progress: &mut dyn FnMut(usize, usize)) -> Result<MatmulTuning> {
        let begun = Instant::now();
        let mut tuning = MatmulTuning::default();
        let Some(state) = self.matmuls.get() else { return Ok(tuning) };
        let wanted = self.untuned(state, rows, &mut tuning)?;
        if wanted.is_empty() {
            return Ok(tuning);
        }
        let bench = Bench::new(self, &wanted)?;
        let mut chosen = HashMap::new();
        for (done, shape) in wanted.iter().enumerate() {
            progress(done, wanted.len());
            if begun.elapsed() > TIME_MAX {
                tuning.num_left += 1;
                continue;
            }
            let (plan, timed) = bench.tune(state, shape)?;
            tracing::debug!(%shape, first_us = timed.first_us, best_us = timed.best_us, "matrix product tuned");
            state.set(*shape, Known { plan, is_tuned: true });
            chosen.insert(*shape, plan.algorithm);
            tuning.timed.push(timed);
        }
        progress(wanted.len(), wanted.len());
        if tuning.num_left > 0 {
            tracing::warn!(num_left = tuning.num_left, "too little time or memory to tune all matrix products");
        }
        state.file.store(&chosen);
        Ok(tuning)
    }

    /// Returns what there is to time, and counts what is known or does not fit into memory.
    fn untuned(&self, state: &State, rows: &[usize], tuning: &mut MatmulTuning) -> Result<Vec<MatmulShape>> {
        let bytes_max = self.memory_info()?.free_bytes / 2;
        let _relaxed = self.enter()?;
        let mut wanted = Vec::new();
        for shape in wanted_shapes(&state.snapshot(), rows) {
            if state.known(&shape)?.is_tuned {
                tuning.num_known += 1;
            } else if x_bytes(&shape) + weight_bytes(&shape).max(COLD_BYTES) + out_bytes(&shape) > bytes_max {
                tuning.num_left += 1;
            } else {
                wanted.push(shape);
            }
        }
        Ok(wanted)
    }
}

/// Every product that has a plan, for each of `rows` up to the most that it has a plan for. Products of one dtype
/// follow each other.
fn wanted_shapes(plans: &HashMap<MatmulShape, Known>, rows: &[usize]) -> Vec<MatmulShape> {
    let mut most = HashMap::new();
    for shape in plans.keys() {
        let most = most.entry(with_rows(shape, 2)).or_insert(0);
        *most = shape.rows.max(*most);
    }
    let mut shapes: Vec<MatmulShape> = most
        .iter()
        .flat_map(|(product, most)| {
            rows.iter().filter(|rows| (1..=*most).contains(*rows)).map(|rows| with_rows(product, *rows))
        })
        .collect();
    shapes.sort_by_key(|s| {
        (s.dtype.name(), s.out_dtype.name(), s.outputs, s.depth, s.rows, s.x_stride, s.weight_stride, s.alignment)
    });
    shapes.dedup();
    shapes
}

/// The shape of the same product with another number of rows, densely stored as single rows are.
fn with_rows(shape: &MatmulShape, rows: usize) -> MatmulShape {
    let stride = |stride, dense| if shape.rows == 1 || rows == 1 { dense } else { stride };
    let (x_stride, out_stride) = (stride(shape.x_stride, shape.depth), stride(shape.out_stride, shape.outputs));
    MatmulShape { rows, x_stride, out_stride, ..*shape }
}

fn x_bytes(shape: &MatmulShape) -> usize {
    bytes(shape.rows, shape.x_stride, shape.dtype)
}

fn out_bytes(shape: &MatmulShape) -> usize {
    bytes(shape.rows, shape.out_stride, shape.out_dtype)
}

fn weight_bytes(shape: &MatmulShape) -> usize {
    bytes(shape.outputs, shape.weight_stride, shape.dtype)
}

/// What rows take, and where the next thing may begin.
fn bytes(rows: usize, stride: usize, dtype: DType) -> usize {
    (rows * stride * dtype.size_bytes()).next_multiple_of(256)
}

/// Memory, a stream and events to time products with. The memory holds the rows, copies of the weight, the output and
/// the workspace, in this order.
struct Bench<'a> {
    backend: &'a CudaBackend,
    stream: StreamHandle,
    events: Vec<EventHandle>,
    scratch: DevicePtr,
    /// Where the weights, the output and the workspace begin.
    offsets: [usize; 3],
    /// The dtype whose numbers the memory holds.
    filled: Cell<Option<DType>>,
    num_launched: Cell<usize>,
}

impl<'a> Bench<'a> {
    fn new(backend: &'a CudaBackend, wanted: &[MatmulShape]) -> Result<Self> {
        let most = |bytes: fn(&MatmulShape) -> usize| wanted.iter().map(bytes).max().unwrap_or(0);
        let weights = most(x_bytes);
        let out = weights + most(weight_bytes).max(COLD_BYTES);
        let workspace = out + most(out_bytes);
        let scratch = backend.alloc(workspace + WORKSPACE_BYTES_MAX)?;
        let mut bench = Self {
            backend,
            stream: StreamHandle(0),
            events: Vec::new(),
            scratch,
            offsets: [weights, out, workspace],
            filled: Cell::new(None),
            num_launched: Cell::new(0),
        };
        bench.stream = backend.create_stream("matmul tuning")?;
        for _ in 0..2 * ALGORITHMS_MAX {
            bench.events.push(EventHandle(backend.driver.create_timed_event()?));
        }
        Ok(bench)
    }

    /// Chooses the fastest algorithm of a product.
    fn tune(&self, state: &State, shape: &MatmulShape) -> Result<(MatmulPlan, TunedMatmul)> {
        let _relaxed = self.backend.enter()?;
        self.fill(shape.dtype)?;
        let descriptors = Descriptors::new(state.handle.library, shape)?;
        let found = state.handle.heuristics(&descriptors, shape, WORKSPACE_BYTES_MAX, ALGORITHMS_MAX)?;
        let plan = |h: &Heuristic| MatmulPlan { workspace_bytes: h.workspace_bytes, algorithm: h.algorithm };
        let mut contest = Contest {
            bench: self,
            state,
            shape,
            descriptors: &descriptors,
            entries: found.iter().map(|h| Entry { plan: plan(h), times_ms: Vec::new() }).collect(),
        };
        contest.turn()?; // loads the kernels, so its times are worth nothing
        contest.entries.iter_mut().for_each(|entry| entry.times_ms.clear());
        contest.turn()?;
        let first = plan(&found[0]);
        let fastest_ms = contest.entries.iter().map(Entry::median_ms).fold(f32::INFINITY, f32::min);
        contest.entries.retain(|entry| entry.plan == first || entry.median_ms() <= HOPELESS * fastest_ms);
        for _ in 0..((TURNS_MS / fastest_ms) as usize).clamp(TURNS[0], TURNS[1]) {
            contest.turn()?;
        }
        let (plan, first_ms, best_ms) = contest.verdict(first);
        let timed = TunedMatmul {
            rows: shape.rows,
            outputs: shape.outputs,
            depth: shape.depth,
            dtype: shape.dtype,
            num_algorithms: found.len(),
            first_us: f64::from(first_ms) * 1e3,
            best_us: f64::from(best_ms) * 1e3,
        };
        Ok((plan, timed))
    }

    /// Fills the memory with numbers of a dtype.
    fn fill(&self, dtype: DType) -> Result<()> {
        if self.filled.replace(Some(dtype)) == Some(dtype) {
            return Ok(());
        }
        let block = random(dtype);
        let (bytes, mut filled) = (self.offsets[1], block.len().min(self.offsets[1]));
        self.backend.copy_from_host(self.stream, self.scratch, &block[..filled])?;
        while filled < bytes {
            let more = filled.min(bytes - filled);
            self.backend.driver.copy(self.scratch.0 + filled as u64, self.scratch.0, more, self.stream.0)?;
            filled += more;
        }
        Ok(())
    }

    /// The product of a shape, with the next copy of its weight.
    fn product(&self, shape: &MatmulShape, plan: MatmulPlan) -> Matmul {
        let [weights, out, workspace] = self.offsets;
        let copy_bytes = weight_bytes(shape);
        let copy = self.num_launched.replace(self.num_launched.get() + 1) % ((out - weights) / copy_bytes).max(1);
        let at = |offset: usize| self.scratch.offset_bytes(offset);
        Matmul {
            shape: *shape,
            plan,
            x: at(0),
            weight: at(weights + copy * copy_bytes),
            out: at(out),
            workspace: at(workspace),
        }
    }
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        self.events.iter().for_each(|event| self.backend.destroy_event(*event));
        if self.stream.0 != 0 {
            self.backend.destroy_stream(self.stream);
        }
        self.backend.free(self.scratch); // waits for the work that uses it
    }
}

/// The algorithms of one product against each other.
struct Contest<'a> {
    bench: &'a Bench<'a>,
    state: &'a State,
    shape: &'a MatmulShape,
    descriptors: &'a Descriptors,
    entries: Vec<Entry>,
}

struct Entry {
    plan: MatmulPlan,
    times_ms: Vec<f32>,
}

impl Entry {
    fn median_ms(&self) -> f32 {
        let mut times = self.times_ms.clone();
        times.sort_by(f32::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f32::INFINITY)
    }
}

impl Contest<'_> {
    fn launch(&self, plan: MatmulPlan) -> Result<()> {
        let product = self.bench.product(self.shape, plan);
        self.state.handle.matmul(self.descriptors, &product, self.bench.stream.0)
    }

    /// Returns the plan to use, the median time of the first one, and that of the one to use.
    fn verdict(&self, first: MatmulPlan) -> (MatmulPlan, f32, f32) {
        let of = |plan| self.entries.iter().find(|entry| entry.plan == plan).map_or(f32::INFINITY, Entry::median_ms);
        let first_ms = of(first);
        let best = self.entries.iter().min_by(|a, b| a.median_ms().total_cmp(&b.median_ms()));
        match best.map(|best| (best.plan, best.median_ms())) {
            Some((plan, best_ms)) if best_ms <= WORTHWHILE * first_ms - MARGIN_MS => (plan, first_ms, best_ms),
            _ => (first, first_ms, first_ms),
        }
    }

    /// Launches each algorithm once and adds its time. Each turn begins with another one, so that none is always first,
    /// and with an untimed launch, which keeps the GPU busy while the host enqueues what is timed.
    fn turn(&mut self) -> Result<()> {
        let (driver, stream) = (self.bench.backend.driver, self.bench.stream.0);
        self.entries.rotate_left(1);
        self.launch(self.entries[self.entries.len() - 1].plan)?;
        for (entry, events) in self.entries.iter().zip(self.bench.events.chunks(2)) {
            driver.record_event(events[0].0, stream)?;
            self.launch(entry.plan)?;
            driver.record_event(events[1].0, stream)?;
        }
        driver.synchronize_stream(stream)?;
        for (entry, events) in self.entries.iter_mut().zip(self.bench.events.chunks(2)) {
            entry.times_ms.push(driver.elapsed_ms(events[0].0, events[1].0)?);
        }
        Ok(())
    }
}

/// Numbers in -1..1, as the bytes of a dtype.
fn random(dtype: DType) -> Vec<u8> {
    let mut state = 1u64;
    let numbers = (0..NUM_RANDOM).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    });
    match dtype {
        DType::Bf16 => numbers.flat_map(|number| bf16::from_f32(number).to_le_bytes()).collect(),
        DType::F16 => numbers.flat_map(|number| f16::from_f32(number).to_le_bytes()).collect(),
        _ => numbers.flat_map(f32::to_le_bytes).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(rows: usize, x_stride: usize) -> MatmulShape {
        MatmulShape {
            rows,
            outputs: 64,
            depth: 32,
            x_stride,
            weight_stride: 32,
            out_stride: 64,
            dtype: DType::Bf16,
            out_dtype: DType::Bf16,
            alignment: 256,
        }
    }

    #[test]
    fn a_product_is_timed_up_to_the_most_rows_that_it_was_seen_with() {
        let known = Known { plan: MatmulPlan { workspace_bytes: 0, algorithm: [0; 8] }, is_tuned: false };
        let logits = MatmulShape { outputs: 500, out_stride: 500, ..shape(4, 32) };
        let plans = HashMap::from([shape(1, 32), shape(16, 32), logits].map(|shape| (shape, known)));
        let wanted = wanted_shapes(&plans, &[8, 1, 0, 16, 17, 8]);
        let rows: Vec<_> = wanted.iter().map(|shape| (shape.outputs, shape.rows)).collect();
        assert_eq!(rows, [(64, 1), (64, 8), (64, 16), (500, 1)]);
        assert_eq!(wanted[1], shape(8, 32));
    }

    #[test]
    fn sliced_rows_keep_their_stride_and_a_single_row_has_none() {
        let known = Known { plan: MatmulPlan { workspace_bytes: 0, algorithm: [0; 8] }, is_tuned: false };
        let plans = HashMap::from([(shape(4, 96), known)]);
        assert_eq!(wanted_shapes(&plans, &[1, 2]), [shape(1, 32), shape(2, 96)]);
    }

    #[test]
    fn random_numbers_fill_their_range_in_every_dtype() {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            assert_eq!(random(dtype).len(), NUM_RANDOM * dtype.size_bytes());
        }
        let numbers: Vec<f32> = bytemuck::pod_collect_to_vec(&random(DType::F32));
        let sum: f64 = numbers.iter().map(|number| f64::from(*number)).sum();
        assert!(numbers.iter().all(|number| number.abs() <= 1.0) && sum.abs() < 2000.0, "{sum}");
    }
}
