//! `qk_norm_rope_kv_write`, `kv_write`.

use bcg_kernels::{self as ops, QkNormRopeKvWrite};
use bcg_runtime::{DType, Device};

use super::fixture::{FLOATS, Fixture, assert_close, rms_norm};

const EPS: f64 = 1e-6;

/// Turns a normed head by its position, in f64 on the angle that f32 gives.
fn rope(head: &[f64], position: i32, inv_freq: &[f32]) -> Vec<f64> {
    let half = head.len() / 2;
    let mut out = vec![0.0; head.len()];
    for (i, freq) in inv_freq.iter().enumerate() {
        let (sine, cosine) = f64::from(position as f32 * freq).sin_cos();
        out[i] = head[i] * cosine - head[i + half] * sine;
        out[i + half] = head[i + half] * cosine + head[i] * sine;
    }
    out
}

/// Queries and keys are normalised and turned, values copied, each token goes to its slot, and a padded row (slot -1)
/// writes nothing.
pub(super) fn rope_turns_and_writes_each_token_in_its_slot(device: &Device) {
    for dtype in FLOATS {
        let heads = [(4, 2, 64), (3, 3, 32), (5, 1, 128), (2, 1, 96), (1, 1, 256), (32, 8, 128), (64, 8, 224)];
        for (q_heads, kv_heads, head_dim) in heads {
            for lie in 0..3 {
                check(device, dtype, (q_heads, kv_heads, head_dim), lie);
            }
        }
    }
}

/// Checks one choice of heads; `lie` says which of the ways in which rows may lie.
fn check(device: &Device, dtype: DType, (q_heads, kv_heads, head_dim): (usize, usize, usize), lie: usize) {
    let mut fixture = Fixture::new(device);
    let (tokens, pages, page_size) = (7, 3, 4);
    let (positions, slots) = ([0, 1, 2, 511, 30_000, 7, 9], [5, 0, -1, 11, 3, -1, 4]);
    let heads = q_heads + 2 * kv_heads;
    let qkv = &fixture.random_rows(tokens, heads * head_dim, dtype)[lie];
    let (q_weight, k_weight) = (fixture.random(&[head_dim], dtype), fixture.random(&[head_dim], dtype));
    let frequencies = ops::rope_inv_freq(1_000_000.0, head_dim);
    let inv_freq = device.tensor(&[head_dim / 2], &frequencies).expect("a tensor");
    let width = kv_heads * head_dim;
    let sentinel = vec![9.0; pages * page_size * width];
    let k_cache = fixture.floats(&[pages, page_size, kv_heads, head_dim], dtype, &sentinel);
    let v_cache = fixture.floats(&[pages, page_size, kv_heads, head_dim], dtype, &sentinel);
    let (position, slot) = (fixture.ints(&positions), fixture.ints(&slots));
    let q = fixture.run(|cx| {
        ops::qk_norm_rope_kv_write(
            cx,
            &QkNormRopeKvWrite {
                qkv: &qkv.tensor,
                q_weight: &q_weight.tensor,
                k_weight: &k_weight.tensor,
                inv_freq: &inv_freq,
                positions: &position,
                slots: &slot,
                k_cache: &k_cache.tensor,
                v_cache: &v_cache.tensor,
                eps: EPS as f32,
            },
        )
    });
    let (mut expected_q, mut expected_k, mut expected_v) = (vec![], sentinel.clone(), sentinel);
    for (t, row) in qkv.values.chunks(heads * head_dim).enumerate() {
        let turned = |head: &[f64], weight: &[f64]| rope(&rms_norm(head, weight, EPS), positions[t], &frequencies);
        let (queries, kv) = row.split_at(q_heads * head_dim);
        let (keys, values) = kv.split_at(width);
        expected_q.extend(queries.chunks(head_dim).flat_map(|head| turned(head, &q_weight.values)));
        if let Ok(place) = usize::try_from(slots[t]) {
            let range = place * width..(place + 1) * width;
            let keys: Vec<f64> = keys.chunks(head_dim).flat_map(|head| turned(head, &k_weight.values)).collect();
            expected_k[range.clone()].copy_from_slice(&keys);
            expected_v[range].copy_from_slice(values);
        }
    }
    let what = format!("{q_heads}/{kv_heads} heads of {head_dim}");
    assert_close(&format!("q, {what}"), &fixture.read(&q), &expected_q, dtype, 4.0, 1.0);
    assert_close(&format!("k, {what}"), &fixture.read(&k_cache.tensor), &expected_k, dtype, 4.0, 1.0);
    assert_eq!(fixture.read(&v_cache.tensor), expected_v, "v, {what}");
}

/// Keys and values are copied, each token to its slot, and a padded row (slot -1) writes nothing.
pub(super) fn kv_write_copies_each_token_to_its_slot(device: &Device) {
    let mut fixture = Fixture::new(device);
    let (pages, page_size, slots) = (3, 4, [5, 0, -1, 11, 3, 12]);
    for dtype in FLOATS {
        for ([k_heads, k_dim], [v_heads, v_dim]) in [([2, 64], [2, 64]), ([1, 3], [2, 5]), ([8, 128], [1, 64])] {
            let (k_width, v_width) = (k_heads * k_dim, v_heads * v_dim);
            for (k, v) in fixture.random_rows(slots.len(), k_width, dtype).into_iter().zip(fixture.random_rows(
                slots.len(),
                v_width,
                dtype,
            )) {
                let cache = |heads: usize, dim: usize| {
                    let sentinel = vec![9.0; pages * page_size * heads * dim];
                    fixture.floats(&[pages, page_size, heads, dim], dtype, &sentinel)
                };
                let (mut k_cache, mut v_cache) = (cache(k_heads, k_dim), cache(v_heads, v_dim));
                let slot = fixture.ints(&slots);
                let (k_pages, v_pages) = (&k_cache.tensor, &v_cache.tensor);
                fixture.run(|cx| ops::kv_write(cx, &k.tensor, &v.tensor, &slot, k_pages, v_pages));
                for (known, cache, width) in [(&k, &mut k_cache, k_width), (&v, &mut v_cache, v_width)] {
                    for (row, slot) in known.values.chunks(width).zip(slots) {
                        if (0..12).contains(&slot) {
                            cache.values[slot as usize * width..][..width].copy_from_slice(row);
                        }
                    }
                    assert_eq!(fixture.read(&cache.tensor), cache.values, "{dtype}, {width}");
                }
            }
        }
    }
}
