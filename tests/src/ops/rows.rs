//! `gather_rows`, `push_rows`, `unpack_inputs`, `copy_rows`, `fill`, `fill_random`, `scrub_tail`.

use bcg_kernels as ops;
use bcg_runtime::{DType, Device, LiveBatch, Rows, Runner, RunnerOptions};

use super::fixture::{FLOATS, Fixture, assert_close};

/// `gather_rows` copies rows bit for bit, however they lie; an index outside gives zeros. The indices of the share of a
/// table begin at any row.
pub(super) fn gather_rows_picks_rows(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for columns in [1, 7, 64, 128, 6000] {
            let index = [8, 3, 0, 10, 3, -1, 11, i32::MAX, i32::MIN];
            let on_device = fixture.ints(&index);
            for x in fixture.random_rows(11, columns, dtype) {
                let out = fixture.run(|cx| ops::gather_rows(cx, &x.tensor, &on_device));
                assert_eq!(
                    fixture.read(&out),
                    picked(&x.values, columns, &index.map(i64::from)),
                    "{dtype}, {columns} columns"
                );
                for first in [3, 11, i32::MAX as usize] {
                    let of_share = index.map(|row| i64::from(row) - first as i64);
                    let out = fixture.run(|cx| ops::gather_rows_from(cx, &x.tensor, first, &on_device));
                    assert_eq!(fixture.read(&out), picked(&x.values, columns, &of_share), "{dtype}, from {first}");
                }
            }
        }
    }
}

fn picked(values: &[f64], columns: usize, index: &[i64]) -> Vec<f64> {
    let rows: Vec<&[f64]> = values.chunks(columns).collect();
    let zeros = vec![0.0; columns];
    let row = |i: &i64| usize::try_from(*i).ok().and_then(|i| rows.get(i).copied()).unwrap_or(&zeros);
    index.iter().flat_map(|i| row(i).to_vec()).collect()
}

/// `push_rows` copies the runs that count, of both pairs, and skips those that leave a tensor or are too long.
pub(super) fn push_rows_copies_what_its_list_says(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (rows, far_rows, rows_max) = (40, 50, 16);
    let runs = [
        [0, 5, 16],
        [16, 21, 1],
        [39, 49, 1],
        [20, 30, 7],
        [0, 0, 0],
        [30, 0, 11],
        [0, 45, 6],
        [0, 0, 17],
        [-1, 3, 1],
        [1, -1, 1],
        [5, 0, 3],
    ];
    let flat: Vec<i32> = runs.iter().flat_map(|&[source, target, rows]| [source, target, rows, 0]).collect();
    let list = fixture.ints(&flat).reshape(&[runs.len(), 4]).expect("runs");
    for (widths, count) in [([1, 3], 3), ([64, 8], 10), ([1024, 64], 11), ([17, 9000], i32::MAX), ([40, 7], -1)] {
        let count_in = fixture.ints(&[count]);
        let counted = runs.iter().take(usize::try_from(count).unwrap_or(0));
        let counted =
            counted.filter(|[s, t, n]| *s >= 0 && *t >= 0 && *n <= rows_max && s + n <= rows && t + n <= far_rows);
        let counted: Vec<[usize; 3]> = counted.map(|run| run.map(|number| number as usize)).collect();
        for dtypes in [[DType::Bf16, DType::Bf16], [DType::Bf16, DType::F32]] {
            let sources = [0, 1].map(|i| fixture.random(&[rows as usize, widths[i]], dtypes[i]));
            let mut far = [0, 1].map(|i| {
                let sentinel = vec![9.0; far_rows as usize * widths[i]];
                fixture.floats(&[far_rows as usize, widths[i]], dtypes[i], &sentinel)
            });
            let push = ops::PushRows {
                sources: [&sources[0].tensor, &sources[1].tensor],
                targets: [&far[0].tensor, &far[1].tensor],
                runs: &list,
                count: &count_in,
                rows_max: rows_max as usize,
            };
            fixture.run(|cx| ops::push_rows(cx, &push));
            for ((near, far), width) in sources.iter().zip(&mut far).zip(widths) {
                for &[source, target, rows] in &counted {
                    let source = &near.values[source * width..][..rows * width];
                    far.values[target * width..][..rows * width].copy_from_slice(source);
                }
                assert_eq!(fixture.read(&far.tensor), far.values, "{widths:?}, {count} runs");
            }
        }
    }
}

/// `unpack_inputs` replaces negative tokens by what was chosen, leaves the others, and writes the page table between its
/// borders.
pub(super) fn unpack_inputs_fills_tokens_and_pages(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (tokens, sequences, width) in [(1, 1, 1), (5, 300, 7), (700, 3, 64), (2000, 0, 1)] {
        let ids: Vec<i32> = (0..tokens).map(|i| if i % 3 == 0 { -1 - i % 40 } else { i }).collect();
        let chosen: Vec<i32> = (0..37).map(|row| 1000 + row).collect();
        let packed: Vec<i32> = (0..sequences * width).map(|page| 5000 + page as i32).collect();
        let (ids_in, chosen_in) = (fixture.ints(&ids), fixture.ints(&chosen));
        let packed_in = fixture.ints(&packed).reshape(&[sequences, width]).expect("rows");
        let table = device.zeros(&[sequences, width + 5], DType::I32).expect("a tensor");
        let used = table.columns(2..2 + width).expect("columns");
        fixture.run(|cx| ops::unpack_inputs(cx, &ids_in, &chosen_in, &packed_in, &used));
        let of_row = |row: i32| chosen.get(row as usize).copied().unwrap_or(0);
        let expected: Vec<i32> = ids.iter().map(|&id| if id < 0 { of_row(-1 - id) } else { id }).collect();
        assert_eq!(device.read::<i32>(&ids_in).expect("read"), expected);
        let mut expected = vec![0; sequences * (width + 5)];
        for (row, pages) in expected.chunks_mut(width + 5).zip(packed.chunks(width)) {
            row[2..2 + width].copy_from_slice(pages);
        }
        assert_eq!(device.read::<i32>(&table).expect("read"), expected);
    }
}

/// `copy_rows` writes the rows of a row-sliced output and nothing between them.
pub(super) fn copy_rows_touches_nothing_else(device: &Device) {
    let mut fixture = Fixture::new(device);
    for dtype in FLOATS {
        for (first, columns) in [(0, 1), (1, 6), (3, 5), (8, 8), (8, 9000), (16, 8192)] {
            let width = columns + 24;
            for src in fixture.random_rows(4, columns, dtype) {
                let matrix = fixture.random(&[4, width], dtype);
                let dst = matrix.tensor.columns(first..first + columns).expect("a column range");
                fixture.run(|cx| ops::copy_rows(cx, &dst, &src.tensor));
                let mut expected = matrix.values;
                for (row, values) in expected.chunks_mut(width).zip(src.values.chunks(columns)) {
                    row[first..first + columns].copy_from_slice(values);
                }
                assert_eq!(fixture.read(&matrix.tensor), expected, "{dtype}, {columns} columns from {first}");
            }
        }
    }
}

/// `fill` sets every element of a row-sliced tensor, of every width.
pub(super) fn fill_reaches_every_dtype(device: &Device) {
    let mut fixture = Fixture::new(device);
    let bytes = device.zeros(&[3, 5], DType::U8).expect("a tensor");
    let halves = device.zeros(&[3, 5], DType::Bf16).expect("a tensor");
    let ints = device.zeros(&[3, 5], DType::I32).expect("a tensor");
    let longs = device.zeros(&[3, 5], DType::I64).expect("a tensor");
    fixture.run(|cx| {
        ops::fill(cx, &bytes.columns(1..4)?, 7u8)?;
        ops::fill(cx, &halves.columns(1..4)?, half::bf16::from_f32(-1.5))?;
        ops::fill(cx, &ints.columns(1..4)?, -2i32)?;
        ops::fill(cx, &longs.columns(1..4)?, i64::MIN + 1)
    });
    let expected = |value: f64| [0.0, value, value, value, 0.0].repeat(3);
    assert_eq!(fixture.read(&halves), expected(-1.5)); // waits for all of them
    let of = |row: [i64; 5]| row.repeat(3);
    let (min, two) = (i64::MIN + 1, -2);
    assert_eq!(device.read::<i64>(&longs).expect("read"), of([0, min, min, min, 0]));
    let ints: Vec<i64> = device.read::<i32>(&ints).expect("read").into_iter().map(i64::from).collect();
    assert_eq!(ints, of([0, two, two, two, 0]));
    let bytes: Vec<i64> = device.read::<u8>(&bytes).expect("read").into_iter().map(i64::from).collect();
    assert_eq!(bytes, of([0, 7, 7, 7, 0]));
}

/// `fill_random` gives the numbers of the formula for every index, and they look normal.
pub(super) fn fill_random_follows_the_formula(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (dtype, len) in FLOATS.into_iter().zip([1, 70_000, 2_100_000]) {
        let x = device.empty(&[len], dtype).expect("a tensor");
        fixture.run(|cx| ops::fill_random(cx, &x, 5, 0.5, 0.25));
        let values = fixture.read(&x);
        let expected: Vec<f64> = (0..len as u64).map(|i| 0.5 + 0.25 * nearly_normal(5, i)).collect();
        assert_close("fill_random", &values, &expected, dtype, 1.0, 0.5);
        if len > 1000 {
            let mean = values.iter().sum::<f64>() / len as f64;
            let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / len as f64;
            assert!((mean - 0.5).abs() < 0.005 && (variance.sqrt() - 0.25).abs() < 0.005, "{mean} {variance}");
        }
        fixture.run(|cx| ops::fill_random(cx, &x, 6, 0.5, 0.25));
        assert_ne!(fixture.read(&x), values, "another seed");
    }
}

/// The sum of four uniform 16-bit numbers, scaled to mean 0 and standard deviation 1.
fn nearly_normal(seed: u64, index: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let golden = 0x9e37_79b9_7f4a_7c15_u64;
    let bits = mix(mix(seed.wrapping_add(golden)).wrapping_add(golden.wrapping_mul(index)));
    let sum: f64 = bits.to_le_bytes().chunks(2).map(|pair| f64::from(u16::from_le_bytes([pair[0], pair[1]]))).sum();
    (sum - 131_070.0) / (65_536.0 / 3f64.sqrt())
}

/// `fill` reaches every element of rows that many blocks share, and nothing beside them.
pub(super) fn fill_reaches_every_element_of_wide_rows(device: &Device) {
    let mut fixture = Fixture::new(device);
    for (first, columns) in [(0, 24_000), (8, 16_384), (1, 9001)] {
        let width = columns + 16;
        let matrix = device.zeros(&[3, width], DType::Bf16).expect("a tensor");
        fixture.run(|cx| ops::fill(cx, &matrix.columns(first..first + columns)?, half::bf16::from_f32(2.5)));
        let row = (0..width).map(|c| if (first..first + columns).contains(&c) { 2.5 } else { 0.0 });
        assert_eq!(fixture.read(&matrix), row.collect::<Vec<f64>>().repeat(3), "{columns} columns from {first}");
    }
}

struct Padded(usize);

impl LiveBatch for Padded {
    fn rows(&self) -> Option<Rows> {
        Some(Rows { valid: self.0, padded: 6 })
    }
}

/// `scrub_tail` zeroes the rows from the live number of valid rows on, and no others.
pub(super) fn scrub_tail_zeroes_padded_rows_only(device: &Device) {
    let mut runner = Runner::new(device, RunnerOptions::default()).expect("a runner");
    for valid in [0, 1, 5, 6] {
        let x = device.tensor(&[6, 4], &[f32::NAN; 24]).expect("a tensor");
        let inner = x.columns(1..3).expect("a column range");
        runner.eager(&Padded(valid), |cx| cx.scrub_tail(&inner)).expect("the op runs");
        runner.synchronize().expect("the device is fine");
        for (i, v) in device.read::<f32>(&x).expect("read").into_iter().enumerate() {
            let scrubbed = i / 4 >= valid && (1..3).contains(&(i % 4));
            assert!(if scrubbed { v == 0.0 } else { v.is_nan() }, "{valid} valid rows, element {i}: {v}");
        }
    }
}
