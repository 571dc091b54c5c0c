//! `ssd_scan` in bf16 of published sizes, which has a kernel on tensor cores on CUDA.

use bcg_kernels::{self as ops, StateSlots};
use bcg_runtime::{DType, Device};

use super::fixture::{Fixture, assert_close};
use super::mamba::{Batch, Scan, Sizes};

/// Heads, dimensions of a head, state size, groups.
const SIZES: [Sizes; 3] = [(2, 64, 128, 1), (4, 64, 64, 2), (2, 64, 128, 2)];

/// Sequences that end within a chunk, with it and behind it, dense and between columns of NaN.
pub(super) fn ssd_scan_in_chunks_matches_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (sizes, lie) in SIZES.into_iter().zip([0, 2, 2]) {
        let scan = Scan::new(&mut fixture, sizes, DType::Bf16);
        for (state_dtype, in_place) in [(DType::F32, false), (DType::Bf16, true)] {
            let batch = Batch::new(&mut fixture, &[1, 2, 15, 63, 0, 64, 65, 16, 128, 200], in_place);
            scan.check(&mut fixture, &batch, state_dtype, lie, false);
        }
    }
}

/// More heads of sequences than a device has blocks, long ones ahead of short ones and behind them: each is scanned once.
pub(super) fn ssd_scan_shares_heads_among_blocks(device: &Device) {
    let mut fixture = Fixture::new(device);
    let scan = Scan::new(&mut fixture, (32, 64, 64, 4), DType::Bf16);
    let mut lens: Vec<usize> = (0..40).map(|b| b * 7 % 4).collect();
    (lens[0], lens[30]) = (66, 70);
    for lens in [&lens[..], &lens[30..31]] {
        let batch = Batch::new(&mut fixture, lens, true);
        scan.check(&mut fixture, &batch, DType::F32, 0, false);
    }
}

/// A sequence that is cut and goes on from the slot that it wrote is as if it had not been cut.
pub(super) fn ssd_scan_goes_on_where_it_stopped(device: &Device) {
    let mut fixture = Fixture::new(device);
    let rows = 150;
    for sizes in SIZES {
        let scan = Scan::new(&mut fixture, sizes, DType::Bf16);
        let inputs = scan.widths().map(|width| fixture.random(&[rows, width], DType::Bf16).tensor);
        let (heads, head_dim, state_size, _) = sizes;
        let state = device.zeros(&[3, heads, head_dim, state_size], DType::F32).expect("a tensor");
        let mut run = |from: usize, to: usize, read: i32, write: i32| {
            let rows = inputs.each_ref().map(|input| input.rows(from..to).expect("a row range"));
            let slots = StateSlots { read: fixture.ints(&[read]), write: fixture.ints(&[write]) };
            let starts = fixture.ints(&[0, (to - from) as i32]);
            let out = fixture.run(|cx| ops::ssd_scan(cx, &scan.inputs(rows.each_ref(), &state, &slots), &starts));
            fixture.read(&out)
        };
        let whole = run(0, rows, -1, 0);
        for cut in [1, 64, 77] {
            let parts = [run(0, cut, -1, 1), run(cut, rows, 1, 2)].concat();
            // Nearly equal numbers may be rounded to neighbours.
            assert_close("rows behind a cut", &parts, &whole, DType::Bf16, 2.1, 1.0);
            let states = device.read::<f32>(&state).expect("the states are read");
            let states: Vec<f64> = states.into_iter().map(f64::from).collect();
            let len = states.len() / 3;
            assert_close("the state", &states[2 * len..], &states[..len], DType::F32, 128.0, 1.0);
        }
    }
}
