//! The ops of latent attention: `mla_kv_write`, `head_linear`, `mla_decode` and `mla_prefill`.

use bcg_kernels::{self as ops, DecodePlan, LatentKv, MlaKvWrite, MlaPrefill};
use bcg_runtime::{DType, Device, Tensor};
use half::bf16;

use super::fixture::{FLOATS, Fixture, Known, assert_close, rms_norm};

const EPS: f64 = 1e-6;

/// Turns the pairs of a rope part by its position, in f64 on the angle that f32 gives.
fn rope(part: &[f64], position: i32, inv_freq: &[f32], is_interleaved: bool, scale: f64) -> Vec<f64> {
    let mut out = vec![0.0; part.len()];
    for (i, freq) in inv_freq.iter().enumerate() {
        let (x, y) = if is_interleaved { (2 * i, 2 * i + 1) } else { (i, i + part.len() / 2) };
        let (sine, cosine) = f64::from(position as f32 * freq).sin_cos();
        out[x] = (part[x] * cosine - part[y] * sine) * scale;
        out[y] = (part[y] * cosine + part[x] * sine) * scale;
    }
    out
}

/// Latents are normalised, rope parts turned, each token goes to its slot, and a padded row (slot -1) writes nothing.
pub(super) fn mla_kv_write_norms_turns_and_writes_each_token_in_its_slot(device: &Device) {
    for dtype in FLOATS {
        // Heads, Dn, L, R.
        for dims in [(16, 128, 512, 64), (4, 32, 64, 32), (3, 64, 96, 128), (1, 16, 32, 32)] {
            for lie in 0..3 {
                check_write(device, dtype, dims, lie);
            }
        }
    }
}

fn check_write(device: &Device, dtype: DType, dims: (usize, usize, usize, usize), lie: usize) {
    let mut fixture = Fixture::new(device);
    let (heads, nope_dim, latent_dim, rope_dim) = dims;
    let (tokens, pages, page_size) = (7, 3, 4);
    let (positions, slots) = ([0, 1, 2, 511, 30_000, 7, 9], [5, 0, -1, 11, 3, -1, 4]);
    let (is_interleaved, rope_scale) = (lie != 1, if lie == 2 { 1.25 } else { 1.0 });
    let q = &fixture.random_rows(tokens, heads * (nope_dim + rope_dim), dtype)[lie];
    let kv_a = &fixture.random_rows(tokens, latent_dim + rope_dim, dtype)[lie];
    let weight = fixture.random(&[latent_dim], dtype);
    let frequencies = ops::rope_inv_freq(10_000.0, rope_dim);
    let filled = |dim: usize| vec![9.0; pages * page_size * dim];
    let latents = fixture.floats(&[pages, page_size, 1, latent_dim], dtype, &filled(latent_dim));
    let rope_keys = fixture.floats(&[pages, page_size, 1, rope_dim], dtype, &filled(rope_dim));
    let input = MlaKvWrite {
        q: &q.tensor,
        kv_a: &kv_a.tensor,
        weight: &weight.tensor,
        inv_freq: &device.tensor(&[rope_dim / 2], &frequencies).expect("a tensor"),
        positions: &fixture.ints(&positions),
        slots: &fixture.ints(&slots),
        latents: &latents.tensor,
        rope_keys: &rope_keys.tensor,
        heads,
        is_interleaved,
        eps: EPS as f32,
        rope_scale,
    };
    let q_pe = fixture.run(|cx| ops::mla_kv_write(cx, &input));
    let turn = |part: &[f64], t: usize| rope(part, positions[t], &frequencies, is_interleaved, rope_scale.into());
    let queries = q.values.chunks(nope_dim + rope_dim).enumerate();
    let expected_q: Vec<f64> = queries.flat_map(|(i, head)| turn(&head[nope_dim..], i / heads)).collect();
    let (mut expected_latents, mut expected_keys) = (filled(latent_dim), filled(rope_dim));
    for (t, row) in kv_a.values.chunks(latent_dim + rope_dim).enumerate() {
        let Ok(place) = usize::try_from(slots[t]) else { continue };
        let latent = rms_norm(&row[..latent_dim], &weight.values, EPS);
        expected_latents[place * latent_dim..(place + 1) * latent_dim].copy_from_slice(&latent);
        expected_keys[place * rope_dim..(place + 1) * rope_dim].copy_from_slice(&turn(&row[latent_dim..], t));
    }
    let what = |name: &str| format!("{name}, {dims:?}");
    assert_close(&what("q_pe"), &fixture.read(&q_pe), &expected_q, dtype, 2.0, 1.0);
    assert_close(&what("latents"), &fixture.read(&latents.tensor), &expected_latents, dtype, 4.0, 1.0);
    assert_close(&what("rope keys"), &fixture.read(&rope_keys.tensor), &expected_keys, dtype, 2.0, 1.0);
}

/// Each head's rows meet that head's weight, in both layouts, and the number of tokens changes no bit.
pub(super) fn head_linear_multiplies_each_head_with_its_own_weight(device: &Device) {
    // Heads, K, N, elements of a head's weight that another view has.
    for (heads, depth, outputs, rest) in [(16, 128, 512, 128), (16, 512, 128, 128), (4, 32, 64, 32), (3, 20, 33, 7)] {
        for (dtype, is_transposed) in FLOATS.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
            let mut fixture = Fixture::new(device);
            let width = depth * outputs;
            let wide = fixture.random(&[heads, width + rest * 8], dtype);
            let view = wide.tensor.columns(0..width).expect("columns");
            let shape = if is_transposed { [heads, depth, outputs] } else { [heads, outputs, depth] };
            let weight = view.reshape(&shape).expect("a view");
            let (next, step) = if is_transposed { (outputs, 1) } else { (1, depth) };
            let of_head = |h: usize| &wide.values[h * (width + rest * 8)..][..width];
            let x = fixture.random_between(41 * heads, depth, 8, 16, dtype);
            let multiply = |fixture: &mut Fixture, tokens: usize| {
                let x = x.tensor.rows(0..tokens * heads).expect("rows");
                let out = fixture.run(|cx| {
                    if is_transposed {
                        ops::head_linear_transposed(cx, &x, &weight)
                    } else {
                        ops::head_linear(cx, &x, &weight)
                    }
                });
                fixture.read(&out)
            };
            let rows = x.values.chunks(depth).enumerate();
            let expected: Vec<f64> = rows
                .flat_map(|(i, row)| {
                    let weight = of_head(i % heads);
                    let element = move |n: usize| -> f64 {
                        row.iter().enumerate().map(|(k, x)| x * weight[n * step + k * next]).sum()
                    };
                    (0..outputs).map(element)
                })
                .collect();
            let what = format!("{heads} heads, {depth} to {outputs}, transposed {is_transposed}");
            let actual = multiply(&mut fixture, 41);
            // An f32 sum of so many products is some roundings of the largest partial sum off.
            assert_close(&what, &actual, &expected, dtype, 2.0, 2.0 * (depth as f64).sqrt());
            for tokens in [1, 17, 32] {
                assert_eq!(multiply(&mut fixture, tokens), actual[..tokens * heads * outputs], "{what}, {dtype}");
            }
        }
    }
}

/// The widths of a model's latent attention.
#[derive(Clone, Copy, Debug)]
struct Dims {
    heads: usize,
    latent: usize,
    nope: usize,
    rope: usize,
    value: usize,
}

const SMALL: Dims = Dims { heads: 4, latent: 64, nope: 32, rope: 32, value: 32 };
const LARGE: Dims = Dims { heads: 16, latent: 512, nope: 128, rope: 64, value: 128 };
const ODD: Dims = Dims { heads: 3, latent: 96, nope: 20, rope: 64, value: 33 };

/// Paged latents and rope keys of some sequences in shuffled pages; everything else there is NaN.
struct Cache {
    latents: Known,
    rope_keys: Known,
    page_table: Tensor,
    kv_lens: Vec<i32>,
    /// Where each key of each sequence lies, in tokens.
    places: Vec<Vec<usize>>,
    dims: Dims,
}

impl Cache {
    fn new(fixture: &mut Fixture, dtype: DType, kv_lens: &[i32], page_size: usize, dims: Dims) -> Self {
        let num_pages = |len: i32| (len as usize).div_ceil(page_size);
        let max_pages = kv_lens.iter().map(|len| num_pages(*len)).max().unwrap_or(0) + 1;
        let pages = kv_lens.iter().map(|len| num_pages(*len)).sum::<usize>() + 2;
        let mut free = fixture.shuffled(pages);
        let tokens = pages * page_size;
        let mut latents = vec![f64::NAN; tokens * dims.latent];
        let mut rope_keys = vec![f64::NAN; tokens * dims.rope];
        let (mut table, mut places) = (vec![], vec![]);
        for len in kv_lens {
            let own: Vec<usize> = free.split_off(free.len() - num_pages(*len));
            // Entries behind the last page are never read, so they may hold anything.
            table.extend((0..max_pages).map(|i| own.get(i).map_or(i32::MAX, |page| *page as i32)));
            let place = |key: usize| own[key / page_size] * page_size + key % page_size;
            let of_sequence: Vec<usize> = (0..*len as usize).map(place).collect();
            for place in &of_sequence {
                latents[place * dims.latent..][..dims.latent].copy_from_slice(&fixture.numbers(dims.latent));
                rope_keys[place * dims.rope..][..dims.rope].copy_from_slice(&fixture.numbers(dims.rope));
            }
            places.push(of_sequence);
        }
        Self {
            latents: fixture.floats(&[pages, page_size, 1, dims.latent], dtype, &latents),
            rope_keys: fixture.floats(&[pages, page_size, 1, dims.rope], dtype, &rope_keys),
            page_table: fixture.device.tensor(&[kv_lens.len(), max_pages], &table).expect("a tensor"),
            kv_lens: kv_lens.to_vec(),
            places,
            dims,
        }
    }

    fn paged(&self) -> LatentKv<'_> {
        let (latents, rope_keys) = (&self.latents.tensor, &self.rope_keys.tensor);
        LatentKv { latents, rope_keys, page_table: &self.page_table }
    }

    fn latent(&self, place: usize) -> &[f64] {
        &self.latents.values[place * self.dims.latent..][..self.dims.latent]
    }

    /// The weighted mean of the latents of the first `keys` keys of sequence `b`, in f64.
    fn attend(&self, q_latent: &[f64], q_pe: &[f64], (b, keys): (usize, usize), scale: f64) -> Vec<f64> {
        let places = &self.places[b][..keys];
        let score = |place: &usize| {
            let rope_key = &self.rope_keys.values[place * self.dims.rope..][..self.dims.rope];
            scale * (dot(self.latent(*place), q_latent) + dot(rope_key, q_pe))
        };
        let weights: Vec<f64> = places.iter().map(|place| score(place).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut mean = vec![0.0; self.dims.latent];
        for (place, weight) in places.iter().zip(&weights) {
            mean.iter_mut().zip(self.latent(*place)).for_each(|(m, v)| *m += weight / total * v);
        }
        mean
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The plan of a decode of these lengths.
fn decode_plan(fixture: &Fixture, kv_lens: &[i32], heads: usize) -> Tensor {
    let plan = DecodePlan::new(&fixture.device, heads, 1);
    let mut values = vec![];
    plan.fill(kv_lens, &mut values);
    fixture.device.tensor(&plan.shape(), &values).expect("a tensor")
}

/// One query of each head attends to every key of its sequence; a sequence without keys (a padded row) gives zeros.
pub(super) fn mla_decode_attends_to_all_keys(device: &Device) {
    let wide = Dims { heads: 40, ..SMALL };
    let lens = [1, 0, 63, 64, 65, 17, 1003, 128];
    let cases: [(Dims, usize, &[i32]); 6] = [
        (SMALL, 16, &lens),
        (wide, 5, &lens),
        (Dims { heads: 12, ..SMALL }, 1, &[2000]),
        (LARGE, 64, &[130, 0, 33, 7]),
        (Dims { heads: 128, ..LARGE }, 16, &[97, 1]),
        (ODD, 4, &[70, 0, 3]),
    ];
    for (dims, page_size, kv_lens) in cases {
        for dtype in FLOATS {
            let mut fixture = Fixture::new(device);
            let cache = Cache::new(&mut fixture, dtype, kv_lens, page_size, dims);
            let q_latent = fixture.random(&[kv_lens.len() * dims.heads, dims.latent], dtype);
            let q_pe = fixture.random(&[kv_lens.len(), dims.heads * dims.rope], dtype);
            let (scale, lens) = (((dims.latent + dims.rope) as f32).powf(-0.5), fixture.ints(kv_lens));
            let plan = decode_plan(&fixture, kv_lens, dims.heads);
            let mut decode = || {
                let (q_latent, q_pe, kv) = (&q_latent.tensor, &q_pe.tensor, cache.paged());
                let out = fixture.run(|cx| ops::mla_decode(cx, q_latent, q_pe, &kv, &lens, &plan, scale));
                fixture.read(&out)
            };
            let (first, second) = (decode(), decode());
            let queries = q_latent.values.chunks(dims.latent).zip(q_pe.values.chunks(dims.rope)).enumerate();
            let expected: Vec<f64> = queries
                .flat_map(|(i, (q_latent, q_pe))| {
                    let b = i / dims.heads;
                    cache.attend(q_latent, q_pe, (b, kv_lens[b] as usize), scale.into())
                })
                .collect();
            let what = format!("{dims:?}, pages of {page_size}");
            assert_close(&what, &first, &expected, dtype, 2.0, 0.5);
            assert_eq!(first, second, "{what}, {dtype}: a plan serves any number of launches");
        }
    }
}

/// Padding a decode with rows without keys changes no bit of the other rows, and a page that the cache does not have
/// hides its keys.
pub(super) fn mla_decode_rows_do_not_depend_on_padded_rows(device: &Device) {
    for (dims, dtype) in [(SMALL, DType::Bf16), (LARGE, DType::Bf16), (SMALL, DType::F32)] {
        let mut fixture = Fixture::new(device);
        let kv_lens = [200, 0, 3, 65, 300, 0, 0, 0];
        let mut cache = Cache::new(&mut fixture, dtype, &kv_lens, 16, dims);
        let q_latent = fixture.random(&[8 * dims.heads, dims.latent], dtype);
        let q_pe = fixture.random(&[8, dims.heads * dims.rope], dtype);
        let decode = |fixture: &mut Fixture, cache: &Cache, rows: usize| {
            let lens = fixture.ints(&kv_lens[..rows]);
            let plan = decode_plan(fixture, &kv_lens[..rows], dims.heads);
            let page_table = cache.page_table.rows(0..rows).expect("rows");
            let kv = LatentKv { page_table: &page_table, ..cache.paged() };
            let q_latent = q_latent.tensor.rows(0..rows * dims.heads).expect("rows");
            let q_pe = q_pe.tensor.rows(0..rows).expect("rows");
            let out = fixture.run(|cx| ops::mla_decode(cx, &q_latent, &q_pe, &kv, &lens, &plan, 0.1));
            fixture.read(&out)
        };
        let (alone, padded) = (decode(&mut fixture, &cache, 5), decode(&mut fixture, &cache, 8));
        assert_eq!(alone, padded[..alone.len()], "{dims:?}");
        assert!(padded[alone.len()..].iter().all(|value| *value == 0.0));
        let mut table = fixture.read_i32(&cache.page_table);
        (table[0], table[2]) = (-1, i32::MAX);
        cache.page_table = device.tensor(cache.page_table.shape(), &table).expect("a tensor");
        let hidden = decode(&mut fixture, &cache, 5);
        cache.places[0].drain(32..48);
        cache.places[0].drain(0..16);
        let queries = q_latent.values.chunks(dims.latent).zip(q_pe.values.chunks(dims.rope)).take(dims.heads);
        let scale = f64::from(0.1f32);
        let expected: Vec<f64> = queries.flat_map(|(q, q_pe)| cache.attend(q, q_pe, (0, 168), scale)).collect();
        assert_close("pages outside", &hidden[..expected.len()], &expected, dtype, 2.0, 0.5);
    }
}

/// New tokens behind prefixes, and the queries of all of them followed by padded rows of NaN.
struct Prefill {
    cache: Cache,
    q: Known,
    q_pe: Known,
    kv_b_proj: Known,
    starts: Vec<i32>,
    prefix: Vec<usize>,
    dtype: DType,
    workspace_bytes: usize,
}

impl Prefill {
    fn new(fixture: &mut Fixture, dtype: DType, sequences: &[(usize, usize)], dims: Dims, page_size: usize) -> Self {
        let kv_lens: Vec<i32> = sequences.iter().map(|(new, prefix)| (new + prefix) as i32).collect();
        let cache = Cache::new(fixture, dtype, &kv_lens, page_size, dims);
        let mut starts = vec![0];
        sequences.iter().for_each(|(new, _)| starts.push(starts[starts.len() - 1] + *new as i32));
        let valid = starts[sequences.len()] as usize;
        let mut rows = |width: usize| {
            let mut values = fixture.numbers(valid * width);
            values.resize((valid + 3) * width, f64::NAN);
            fixture.floats(&[valid + 3, width], dtype, &values)
        };
        let (q, q_pe) = (rows(dims.heads * (dims.nope + dims.rope)), rows(dims.heads * dims.rope));
        // Keys and values of about 1.
        let mut weight = fixture.numbers(dims.heads * (dims.nope + dims.value) * dims.latent);
        weight.iter_mut().for_each(|w| *w *= 3.0 / (dims.latent as f64).sqrt());
        let kv_b_proj = fixture.floats(&[dims.heads, dims.nope + dims.value, dims.latent], dtype, &weight);
        let prefix = sequences.iter().map(|(_, prefix)| *prefix).collect();
        Self { cache, q, q_pe, kv_b_proj, starts, prefix, dtype, workspace_bytes: 1 << 20 }
    }

    fn scale(&self) -> f32 {
        ((self.cache.dims.nope + self.cache.dims.rope) as f32).powf(-0.5)
    }

    fn width(&self) -> usize {
        self.cache.dims.heads * self.cache.dims.value
    }

    /// Runs the op over sequences of these starts and lengths; without the padded rows.
    fn run_batch(&self, fixture: &mut Fixture, starts: &[i32], kv_lens: &[i32], page_table: &Tensor) -> Vec<f64> {
        let mut plan = vec![];
        let sequences = self.starts.len() - 1;
        ops::attention_prefill_plan(&starts[..=sequences], &kv_lens[..sequences], &mut plan);
        if kv_lens.len() > sequences {
            plan.resize(ops::attention_prefill_plan_len(self.q.tensor.dim(0), kv_lens.len()), i32::MAX);
        }
        let input = MlaPrefill {
            q: &self.q.tensor,
            q_pe: &self.q_pe.tensor,
            kv_b_proj: &self.kv_b_proj.tensor,
            kv: LatentKv { page_table, ..self.cache.paged() },
            cu_seqlens_q: &fixture.ints(starts),
            kv_lens: &fixture.ints(kv_lens),
            plan: &fixture.ints(&plan),
            scale: self.scale(),
            workspace_bytes: self.workspace_bytes,
        };
        let out = fixture.run(|cx| ops::mla_prefill(cx, &input));
        let valid = self.starts[sequences] as usize;
        fixture.read(&out.rows(0..valid).expect("the valid rows"))
    }

    fn run(&self, fixture: &mut Fixture) -> Vec<f64> {
        self.run_batch(fixture, &self.starts, &self.cache.kv_lens, &self.cache.page_table)
    }

    /// What the op must give, where the last `hidden` of each sequence's places were taken out of its prefix.
    fn expected(&self, hidden: usize) -> Vec<f64> {
        let Dims { heads, latent, nope, rope, value } = self.cache.dims;
        let mut out = vec![];
        for (b, prefix) in self.prefix.iter().enumerate() {
            for t in self.starts[b] as usize..self.starts[b + 1] as usize {
                let keys = prefix + t - self.starts[b] as usize + 1 - hidden;
                for h in 0..heads {
                    let q = &self.q.values[(t * heads + h) * (nope + rope)..][..nope];
                    let q_pe = &self.q_pe.values[(t * heads + h) * rope..][..rope];
                    let weight = &self.kv_b_proj.values[h * (nope + value) * latent..][..(nope + value) * latent];
                    let mut q_latent = vec![0.0; latent];
                    for (q, row) in q.iter().zip(weight.chunks(latent)) {
                        q_latent.iter_mut().zip(row).for_each(|(sum, w)| *sum += q * w);
                    }
                    let mean = self.cache.attend(&q_latent, q_pe, (b, keys), self.scale().into());
                    out.extend(weight.chunks(latent).skip(nope).map(|row| dot(row, &mean)));
                }
            }
        }
        out
    }

    /// Keys and values are rounded on the way, too.
    fn assert_close(&self, what: &str, actual: &[f64], expected: &[f64]) {
        assert_close(&format!("{what}, {:?}", self.cache.dims), actual, expected, self.dtype, 4.0, 1.0);
    }
}

/// Widths, page size, and the new tokens and prefix of each sequence.
type Case<'a> = (Dims, usize, &'a [(usize, usize)]);

/// Each row attends to its sequence's prefix and to the new rows up to itself.
pub(super) fn mla_prefill_attends_to_prefix_and_itself(device: &Device) {
    let cases: [Case<'_>; 6] = [
        (SMALL, 16, &[(1, 0), (130, 0), (3, 200), (64, 64)]),
        (SMALL, 1, &[(20, 300)]),
        (Dims { heads: 5, ..SMALL }, 5, &[(128, 1), (1, 127)]),
        (Dims { heads: 3, ..LARGE }, 16, &[(70, 0), (2, 129)]),
        (LARGE, 64, &[(33, 0)]),
        (ODD, 4, &[(9, 0), (2, 30)]),
    ];
    for (dims, page_size, sequences) in cases {
        for dtype in FLOATS {
            let mut fixture = Fixture::new(device);
            let prefill = Prefill::new(&mut fixture, dtype, sequences, dims, page_size);
            let actual = prefill.run(&mut fixture);
            prefill.assert_close("prefill", &actual, &prefill.expected(0));
        }
    }
}

/// A page that the cache does not have hides its keys from all rows.
pub(super) fn mla_prefill_skips_pages_outside_the_cache(device: &Device) {
    for (dims, dtype) in [(SMALL, DType::Bf16), (Dims { heads: 1, ..LARGE }, DType::Bf16), (ODD, DType::F32)] {
        for outside in [-1, i32::MAX] {
            let mut fixture = Fixture::new(device);
            let mut prefill = Prefill::new(&mut fixture, dtype, &[(30, 100)], dims, 16);
            let mut table = fixture.read_i32(&prefill.cache.page_table);
            table[2] = outside;
            prefill.cache.page_table = device.tensor(&[1, table.len()], &table).expect("a tensor");
            let actual = prefill.run(&mut fixture);
            prefill.cache.places[0].drain(32..48);
            prefill.assert_close("a page outside", &actual, &prefill.expected(16));
        }
    }
}

/// Sequences without rows and keys, and numbers behind the plan's items, change nothing and are not read; and a
/// sequence's rows are the same bits alone and in a batch.
pub(super) fn mla_prefill_rows_do_not_depend_on_other_sequences(device: &Device) {
    for (dims, dtype) in [(SMALL, DType::Bf16), (Dims { heads: 2, ..LARGE }, DType::Bf16), (SMALL, DType::F32)] {
        let mut fixture = Fixture::new(device);
        let prefill = Prefill::new(&mut fixture, dtype, &[(30, 0), (140, 60)], dims, 16);
        let alone = prefill.run(&mut fixture);
        let (mut starts, mut kv_lens) = (prefill.starts.clone(), prefill.cache.kv_lens.clone());
        starts.resize(45, starts[2]);
        kv_lens.resize(44, 0);
        let mut table = fixture.read_i32(&prefill.cache.page_table);
        let width = table.len() / 2;
        table.resize(44 * width, i32::MAX);
        let page_table = device.tensor(&[44, width], &table).expect("a tensor");
        assert_eq!(prefill.run_batch(&mut fixture, &starts, &kv_lens, &page_table), alone, "{dims:?}, {dtype}");
        let rows = |known: &Known| known.tensor.rows(30..170).expect("rows");
        let mut plan = vec![];
        ops::attention_prefill_plan(&[0, 140], &[200], &mut plan);
        let input = MlaPrefill {
            q: &rows(&prefill.q),
            q_pe: &rows(&prefill.q_pe),
            kv_b_proj: &prefill.kv_b_proj.tensor,
            kv: LatentKv { page_table: &page_table.rows(1..2).expect("a row"), ..prefill.cache.paged() },
            cu_seqlens_q: &fixture.ints(&[0, 140]),
            kv_lens: &fixture.ints(&[200]),
            plan: &fixture.ints(&plan),
            scale: prefill.scale(),
            workspace_bytes: prefill.workspace_bytes,
        };
        let second = fixture.run(|cx| ops::mla_prefill(cx, &input));
        assert_eq!(fixture.read(&second), alone[30 * prefill.width()..], "{dims:?}, {dtype}");
    }
}

/// Attention reads what the kernels before it wrote, and those behind it overwrite that only when it is done.
pub(super) fn mla_prefill_keeps_its_place_between_kernels(device: &Device) {
    for dims in [SMALL, Dims { heads: 2, ..LARGE }, ODD] {
        let mut fixture = Fixture::new(device);
        let prefill = Prefill::new(&mut fixture, DType::Bf16, &[(130, 0), (20, 60)], dims, 16);
        let alone = prefill.run(&mut fixture);
        let mut plan = vec![];
        ops::attention_prefill_plan(&prefill.starts, &prefill.cache.kv_lens, &mut plan);
        let sources =
            [&prefill.cache.latents, &prefill.cache.rope_keys, &prefill.q, &prefill.q_pe].map(|known| &known.tensor);
        let copies = sources.map(|source| device.zeros(source.shape(), source.dtype()).expect("a tensor"));
        let [latents, rope_keys, q, q_pe] = &copies;
        let input = MlaPrefill {
            q,
            q_pe,
            kv_b_proj: &prefill.kv_b_proj.tensor,
            kv: LatentKv { latents, rope_keys, page_table: &prefill.cache.page_table },
            cu_seqlens_q: &fixture.ints(&prefill.starts),
            kv_lens: &fixture.ints(&prefill.cache.kv_lens),
            plan: &fixture.ints(&plan),
            scale: prefill.scale(),
            workspace_bytes: prefill.workspace_bytes,
        };
        let outs = fixture.run(|cx| {
            let mut outs = vec![];
            for _ in 0..4 {
                copies.iter().zip(sources).try_for_each(|(copy, source)| ops::copy_rows(cx, copy, source))?;
                outs.push(ops::mla_prefill(cx, &input)?);
                copies.iter().try_for_each(|copy| ops::fill(cx, copy, bf16::NAN))?;
            }
            Ok(outs)
        });
        for out in &outs {
            assert_eq!(fixture.read(out)[..alone.len()], alone, "{dims:?}");
        }
    }
}

/// Keys and values that do not fit into the workspace together take turns, which changes no bit.
pub(super) fn mla_prefill_gives_the_same_bits_in_any_workspace(device: &Device) {
    for dims in [Dims { heads: 7, ..SMALL }, Dims { heads: 3, ..LARGE }] {
        let mut fixture = Fixture::new(device);
        let sequences = [(30, 0), (1, 250), (140, 60), (2, 0)];
        let mut prefill = Prefill::new(&mut fixture, DType::Bf16, &sequences, dims, 16);
        let once = prefill.run(&mut fixture);
        prefill.assert_close("prefill", &once, &prefill.expected(0));
        // The longest sequence and one head; two heads of it; several sequences, or all heads of some.
        let row_bytes = 2 * (dims.nope + dims.value);
        for rows in [0, 700, 900, 1800] {
            prefill.workspace_bytes = rows * row_bytes;
            assert_eq!(prefill.run(&mut fixture), once, "{dims:?}, {rows} rows");
        }
    }
}
