//! Valid rows and padded tails (law L11).

use bcg_runtime::{BreakableCudaGraph, Context, DType, Device, Eager, Error, Result, Tensor, eager_on_graph};

use super::fixture::{Batch, Graph, assert_like_eager, batch, bits, failure, iota, padded, runner, scaled, step};
use super::kernels::{axpy, column_sum, reverse_scan, route};

const SIZE: usize = 6;
const COLS: usize = 5;

/// Fills an input's valid rows with numbers and its tail with NaN.
fn write_rows(runner: &mut bcg_runtime::Runner, x: &Tensor, valid: usize) {
    let cols = x.num_elements() / x.dim(0);
    let data: Vec<f32> = (0..x.num_elements()).map(|i| if i < valid * cols { i as f32 } else { f32::NAN }).collect();
    runner.upload(x, &data).expect("an upload");
}

/// A forward whose rows do not mix.
fn by_row(cx: &mut Context<'_, Batch>, x: &Tensor) -> Result<Tensor> {
    let y = step(cx, x)?;
    let z = scaled(cx, &y)?;
    let w = axpy(cx, 2.0, &z, &y)?;
    let v = scaled(cx, &w)?;
    step(cx, &v)
}

/// For every number of valid rows, with NaN in the input's tail, the valid rows of a replay equal an eager run at the
/// exact size.
pub fn valid_rows_do_not_see_the_tail(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[SIZE, COLS], 0.0);
    let mut graph = Graph::new("padded");
    let captured = x.clone();
    graph.capture(&mut runner, &padded(1.0, SIZE, SIZE), move |cx| by_row(cx, &captured)).expect("a capture");
    for valid in 1..=SIZE {
        write_rows(&mut runner, &x, valid);
        let exact = x.rows(0..valid).expect("rows");
        let eager = runner.eager(&batch(3.0), |cx| by_row(cx, &exact)).expect("an eager run");
        let eager = bits(&mut runner, &eager);
        let replayed = graph.replay(&mut runner, &padded(3.0, valid, SIZE)).expect("a replay");
        let replayed = bits(&mut runner, &replayed);
        assert_eq!(replayed[..valid * COLS], eager, "{valid} valid rows");
    }
}

/// Everything that mixes rows, next to each other: `[C]` sums, `[T, C]` scans, routed counts as f32.
fn mixing(cx: &mut Context<'_, Batch>, x: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let y = scaled(cx, x)?;
    let scan = reverse_scan(cx, x)?;
    let scan = scaled(cx, &scan)?;
    let keys = cx.empty(&[x.dim(0), 1], DType::F32)?;
    cx.copy(&keys, &x.columns(0..1)?)?;
    let counts = route(cx, &keys.reshape(&[x.dim(0)])?, 8 * COLS)?;
    Ok((column_sum(cx, &y)?, scan, counts))
}

/// Reductions, scans and routing read the valid rows from the device, so they ignore the tail.
pub fn kernels_that_mix_rows_ignore_the_tail(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[SIZE, COLS], 0.0);
    let mut graph = BreakableCudaGraph::new("mixing");
    let captured = x.clone();
    graph.capture(&mut runner, &padded(1.0, 2, SIZE), move |cx| mixing(cx, &captured)).expect("a capture");
    for valid in (0..=SIZE).rev() {
        write_rows(&mut runner, &x, valid);
        let exact = x.rows(0..valid.max(1)).expect("rows");
        let live = if valid == 0 { padded(2.0, 0, 1) } else { batch(2.0) };
        let (sum, scan, counts) = runner.eager(&live, |cx| mixing(cx, &exact)).expect("an eager run");
        let expected =
            (bits(&mut runner, &sum), bits(&mut runner, &scan), runner.read::<i32>(&counts).expect("a read"));
        let (sum, scan, counts) = graph.replay(&mut runner, &padded(2.0, valid, SIZE)).expect("a replay");
        assert_eq!(bits(&mut runner, &sum), expected.0, "{valid} valid rows");
        assert_eq!(bits(&mut runner, &scan)[..valid * COLS], expected.1[..valid * COLS], "{valid} valid rows");
        assert_eq!(runner.read::<i32>(&counts).expect("a read"), expected.2, "{valid} valid rows");
    }
}

#[eager_on_graph]
fn three_bridges(cx: &mut Eager<'_, Batch>, x: &Tensor, wide: &Tensor) -> Result<(Tensor, Vec<Tensor>, Tensor)> {
    let scale = cx.live().scale;
    let y = axpy(cx, scale, x, x)?;
    let columns = wide.columns(1..1 + x.dim(1))?;
    cx.copy(&columns, x)?;
    let other = cx.empty(&[x.dim(0) + 1, 2], DType::F32)?;
    cx.fill_bytes(&other, 0x3F)?;
    Ok((y, vec![columns], other))
}

/// The runtime zeroes the tail of every bridge that has the padded number of rows, row-sliced ones too, and leaves other
/// tensors alone; captured code sees the same at capture, at replay and in an eager run.
pub fn the_tail_of_every_bridge_is_scrubbed(device: &Device) {
    type Outputs = (Tensor, Tensor, Tensor, Tensor);
    let mut runner = runner(device);
    let x = iota(device, &[SIZE, COLS], 1.0);
    let captured = x.clone();
    let forward = move |cx: &mut Context<'_, Batch>| {
        let wide = cx.empty(&[SIZE, COLS + 2], DType::F32)?;
        cx.fill_bytes(&wide, 0x3F)?;
        let (y, columns, other) = three_bridges(cx, &captured, &wide)?;
        Ok((step(cx, &y)?, axpy(cx, 0.0, &columns[0], &columns[0])?, other, wide))
    };
    let mut graph = BreakableCudaGraph::<Batch, Outputs>::new("scrub");
    let filler = f32::from_bits(0x3F3F_3F3F);
    let check = |runner: &mut bcg_runtime::Runner, (y, columns, other, wide): Outputs, valid: usize| {
        let mut read = |tensor: &Tensor| runner.read::<f32>(tensor).expect("a read");
        let value = |t: usize, c: usize| if t < valid { (t * COLS + c) as f32 + 1.0 } else { 0.0 };
        let all = |f: &dyn Fn(usize, usize) -> f32, cols: usize| -> Vec<f32> {
            (0..SIZE * cols).map(|i| f(i / cols, i % cols)).collect()
        };
        assert_eq!(read(&y), all(&|t, c| 3.0 * value(t, c) + c as f32, COLS));
        assert_eq!(read(&columns), all(&value, COLS));
        assert_eq!(read(&other), [filler; 2 * (SIZE + 1)], "it has another number of rows");
        let is_edge = |c| c == 0 || c == COLS + 1;
        assert_eq!(read(&wide), all(&|t, c| if is_edge(c) { filler } else { value(t, c - 1) }, COLS + 2));
    };
    let output = graph.capture(&mut runner, &padded(2.0, 3, SIZE), forward.clone()).expect("a capture");
    check(&mut runner, output, 3);
    for valid in [SIZE, 1, 0, 5] {
        let live = padded(2.0, valid, SIZE);
        let output = graph.replay(&mut runner, &live).expect("a replay");
        check(&mut runner, output, valid);
        let output = runner.eager(&live, &forward).expect("an eager run");
        check(&mut runner, output, valid);
    }
}

/// A replay without any valid row runs, and its bridges are zero.
pub fn zero_valid_rows_are_legal(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[SIZE, COLS], 1.0);
    let mut graph = Graph::new("zero");
    let captured = x.clone();
    graph
        .capture(&mut runner, &padded(1.0, SIZE, SIZE), move |cx| {
            let y = scaled(cx, &captured)?;
            axpy(cx, 1.0, &y, &y)
        })
        .expect("a capture");
    write_rows(&mut runner, &x, 0);
    let replayed = graph.replay(&mut runner, &padded(1.0, 0, SIZE)).expect("a replay");
    assert_eq!(runner.read::<f32>(&replayed).expect("a read"), [0.0; SIZE * COLS]);
}

/// At the exact size nothing is scrubbed, and nothing is enqueued for it.
pub fn an_exact_size_scrubs_nothing(device: &Device) {
    let x = iota(device, &[SIZE, COLS], 1.0);
    let mut runner = runner(device);
    let captured = x.clone();
    let exact = padded(3.0, SIZE, SIZE);
    let mut graph = assert_like_eager(&mut runner, &[exact, batch(3.0), exact], move |cx| by_row(cx, &captured));
    let mut launches = |live: &Batch| {
        let before = runner.stats().num_launches;
        graph.replay(&mut runner, live).expect("a replay");
        runner.stats().num_launches - before
    };
    assert_eq!(launches(&padded(3.0, SIZE - 1, SIZE)), launches(&exact) + 2, "one for each bridge");
}

/// More valid rows than padded ones are refused, before anything runs.
pub fn more_valid_than_padded_rows_are_refused(device: &Device) {
    let mut runner = runner(device);
    let x = iota(device, &[SIZE, COLS], 1.0);
    let mut graph = Graph::new("too many");
    graph.capture(&mut runner, &padded(1.0, SIZE, SIZE), move |cx| by_row(cx, &x)).expect("a capture");
    let error = failure(graph.replay(&mut runner, &padded(1.0, SIZE + 1, SIZE)));
    assert!(matches!(error, Error::Option { option: "LiveBatch::rows", .. }), "{error}");
    graph.replay(&mut runner, &padded(1.0, SIZE, SIZE)).expect("a replay");
}
