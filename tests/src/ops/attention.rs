//! `attention_prefill` and `attention_decode`.

use bcg_kernels::{self as ops, DecodePlan, PagedKv};
use bcg_runtime::{DType, Device, Tensor};
use half::bf16;

use super::fixture::{FLOATS, Fixture, Known, assert_close};

/// A paged cache with the keys and values of some sequences in shuffled pages; everything else in it is NaN.
struct Cache {
    k: Known,
    v: Known,
    page_table: Tensor,
    kv_lens: Vec<i32>,
    /// Where each key of each sequence lies, in tokens.
    places: Vec<Vec<usize>>,
    kv_heads: usize,
    head_dim: usize,
}

impl Cache {
    fn new(fixture: &mut Fixture, dtype: DType, kv_lens: &[i32], page_size: usize, heads: (usize, usize)) -> Self {
        let (kv_heads, head_dim) = heads;
        let num_pages = |len: i32| (len as usize).div_ceil(page_size);
        let max_pages = kv_lens.iter().map(|len| num_pages(*len)).max().unwrap_or(0) + 1;
        let pages = kv_lens.iter().map(|len| num_pages(*len)).sum::<usize>() + 2;
        let mut free = fixture.shuffled(pages);
        let (width, tokens) = (kv_heads * head_dim, pages * page_size);
        let (mut k, mut v) = (vec![f64::NAN; tokens * width], vec![f64::NAN; tokens * width]);
        let (mut table, mut places) = (vec![], vec![]);
        for len in kv_lens {
            let own: Vec<usize> = free.split_off(free.len() - num_pages(*len));
            // Entries behind the last page are never read, so they may hold anything.
            table.extend((0..max_pages).map(|i| own.get(i).map_or(i32::MAX, |page| *page as i32)));
            let place = |key: usize| own[key / page_size] * page_size + key % page_size;
            let of_sequence: Vec<usize> = (0..*len as usize).map(place).collect();
            for place in &of_sequence {
                k[place * width..(place + 1) * width].copy_from_slice(&fixture.numbers(width));
                v[place * width..(place + 1) * width].copy_from_slice(&fixture.numbers(width));
            }
            places.push(of_sequence);
        }
        let shape = [pages, page_size, kv_heads, head_dim];
        Self {
            k: fixture.floats(&shape, dtype, &k),
            v: fixture.floats(&shape, dtype, &v),
            page_table: fixture.device.tensor(&[kv_lens.len(), max_pages], &table).expect("a tensor"),
            kv_lens: kv_lens.to_vec(),
            places,
            kv_heads,
            head_dim,
        }
    }

    fn paged(&self) -> PagedKv<'_> {
        PagedKv { k_cache: &self.k.tensor, v_cache: &self.v.tensor, page_table: &self.page_table }
    }

    /// The attention of one query row to the first `keys` keys of sequence `b`, in f64.
    fn attend(&self, query: &[f64], b: usize, keys: usize, scale: f64) -> Vec<f64> {
        let group = query.len() / self.head_dim / self.kv_heads;
        let mut out = vec![];
        for (head, q) in query.chunks(self.head_dim).enumerate() {
            let start = |place: usize| (place * self.kv_heads + head / group) * self.head_dim;
            let of = |cache: &Known, place: usize| cache.values[start(place)..start(place) + self.head_dim].to_vec();
            let places = &self.places[b][..keys];
            let score = |place: &usize| scale * of(&self.k, *place).iter().zip(q).map(|(k, q)| k * q).sum::<f64>();
            let weights: Vec<f64> = places.iter().map(|place| score(place).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut mean = vec![0.0; self.head_dim];
            for (place, weight) in places.iter().zip(&weights) {
                mean.iter_mut().zip(of(&self.v, *place)).for_each(|(m, v)| *m += weight / total * v);
            }
            out.extend(mean);
        }
        out
    }
}

/// The prefill plan of a batch, on the device.
fn prefill_plan(fixture: &Fixture, starts: &[i32], kv_lens: &[i32]) -> Tensor {
    let mut plan = vec![];
    ops::attention_prefill_plan(starts, kv_lens, &mut plan);
    fixture.ints(&plan)
}

/// New tokens behind prefixes, and the queries of all of them followed by padded rows of NaN.
struct Prefill {
    cache: Cache,
    q: Known,
    starts: Vec<i32>,
    prefix: Vec<usize>,
}

impl Prefill {
    fn new(
        fixture: &mut Fixture,
        dtype: DType,
        sequences: &[(usize, usize)],
        heads: (usize, usize, usize),
        page_size: usize,
    ) -> Self {
        let (q_heads, kv_heads, head_dim) = heads;
        let kv_lens: Vec<i32> = sequences.iter().map(|(new, prefix)| (new + prefix) as i32).collect();
        let cache = Cache::new(fixture, dtype, &kv_lens, page_size, (kv_heads, head_dim));
        let mut starts = vec![0];
        sequences.iter().for_each(|(new, _)| starts.push(starts[starts.len() - 1] + *new as i32));
        let (valid, width) = (starts[sequences.len()] as usize, q_heads * head_dim);
        let mut q = fixture.numbers(valid * width);
        q.resize((valid + 3) * width, f64::NAN);
        let q = fixture.floats(&[valid + 3, width], dtype, &q);
        Self { cache, q, starts, prefix: sequences.iter().map(|(_, prefix)| *prefix).collect() }
    }

    fn scale(&self) -> f32 {
        (self.cache.head_dim as f32).powf(-0.5)
    }

    /// Runs the op; without the padded rows.
    fn run(&self, fixture: &mut Fixture) -> Vec<f64> {
        let plan = prefill_plan(fixture, &self.starts, &self.cache.kv_lens);
        let (starts, lens) = (fixture.ints(&self.starts), fixture.ints(&self.cache.kv_lens));
        let (q, kv, scale) = (&self.q.tensor, self.cache.paged(), self.scale());
        let out = fixture.run(|cx| ops::attention_prefill(cx, q, &kv, &starts, &lens, &plan, scale));
        let mut out = fixture.read(&out);
        out.truncate(self.starts[self.prefix.len()] as usize * q.dim(1));
        out
    }

    /// The formula, with this many keys hidden from every row of a sequence.
    fn expected(&self, hidden: usize) -> Vec<f64> {
        let width = self.q.tensor.dim(1);
        let mut expected = vec![];
        for (b, prefix) in self.prefix.iter().enumerate() {
            let first = self.starts[b] as usize;
            for row in first..self.starts[b + 1] as usize {
                let query = &self.q.values[row * width..(row + 1) * width];
                expected.extend(self.cache.attend(query, b, prefix + row - first + 1 - hidden, self.scale().into()));
            }
        }
        expected
    }

    /// Values are in -1..1, so rounding each weight to the dtype, as the tensor cores need, moves a weighted mean by no
    /// more than one rounding, and rounding the mean itself adds one: two roundings relative to 1.
    fn assert_close(&self, what: &str, actual: &[f64], expected: &[f64]) {
        assert_close(what, actual, expected, self.q.tensor.dtype(), 2.0, 1.0);
    }
}

/// Each new token attends to its sequence's prefix and to the new tokens up to itself; padded rows hold anything.
pub(super) fn prefill_attends_to_prefix_and_itself(device: &Device) {
    let few = [(5, 0), (1, 7), (9, 16), (3, 40)];
    let many = [(1, 300), (150, 0), (129, 100), (40, 217)];
    for dtype in FLOATS {
        for (q_heads, kv_heads, head_dim, page_size, sequences) in [
            (4, 2, 64, 16, few),
            (3, 1, 32, 4, few),
            (2, 2, 128, 1, few),
            (2, 1, 96, 5, few),
            (2, 1, 256, 16, few),
            (32, 8, 64, 64, few),
            (16, 8, 128, 16, few),
            (2, 1, 64, 4, many),
            (2, 1, 128, 64, many),
            (1, 1, 128, 8, many),
            (2, 1, 96, 16, many),
        ] {
            let mut fixture = Fixture::new(device);
            let prefill = Prefill::new(&mut fixture, dtype, &sequences, (q_heads, kv_heads, head_dim), page_size);
            let what = format!("{q_heads}/{kv_heads} heads of {head_dim}, pages of {page_size}");
            prefill.assert_close(&what, &prefill.run(&mut fixture), &prefill.expected(0));
        }
    }
}

/// A page that the cache does not have hides its keys from all rows.
pub(super) fn prefill_skips_pages_outside_the_cache(device: &Device) {
    let page_size = 16;
    for (dtype, head_dim) in [(DType::Bf16, 64), (DType::Bf16, 128), (DType::F16, 64), (DType::F32, 32)] {
        for outside in [-1, i32::MAX] {
            let mut fixture = Fixture::new(device);
            let mut prefill = Prefill::new(&mut fixture, dtype, &[(30, 200)], (2, 1, head_dim), page_size);
            let mut table = fixture.read_i32(&prefill.cache.page_table);
            table[2] = outside;
            prefill.cache.page_table = device.tensor(&[1, table.len()], &table).expect("a tensor");
            let actual = prefill.run(&mut fixture);
            prefill.cache.places[0].drain(2 * page_size..3 * page_size);
            prefill.assert_close("a page outside", &actual, &prefill.expected(page_size));
        }
    }
}

/// A sequence's rows are the same bits alone and in a batch: so batching changes no token.
pub(super) fn prefill_rows_do_not_depend_on_other_sequences(device: &Device) {
    for head_dim in [64, 128, 96] {
        let mut fixture = Fixture::new(device);
        let both = Prefill::new(&mut fixture, DType::Bf16, &[(150, 0), (140, 60)], (4, 2, head_dim), 4);
        let together = both.run(&mut fixture);
        let width = 4 * head_dim;
        let q = both.q.tensor.rows(150..290).expect("a row range");
        let page_table = both.cache.page_table.rows(1..2).expect("a row range");
        let paged = PagedKv { page_table: &page_table, ..both.cache.paged() };
        let plan = prefill_plan(&fixture, &[0, 140], &[200]);
        let (starts, lens, scale) = (fixture.ints(&[0, 140]), fixture.ints(&[200]), both.scale());
        let alone = fixture.run(|cx| ops::attention_prefill(cx, &q, &paged, &starts, &lens, &plan, scale));
        assert_eq!(fixture.read(&alone), together[150 * width..]);
    }
}

/// Sequences without rows and keys, and numbers behind the plan's items, change nothing and are not read: so batches of
/// one size can share the shapes of the largest one.
pub(super) fn prefill_does_not_read_behind_the_batch(device: &Device) {
    for (dtype, head_dim) in FLOATS.into_iter().flat_map(|dtype| [64, 128, 96].map(|head_dim| (dtype, head_dim))) {
        let mut fixture = Fixture::new(device);
        let prefill = Prefill::new(&mut fixture, dtype, &[(30, 0), (3, 60)], (2, 1, head_dim), 16);
        let alone = prefill.run(&mut fixture);
        let (mut starts, mut kv_lens) = (prefill.starts.clone(), prefill.cache.kv_lens.clone());
        let mut plan = vec![];
        ops::attention_prefill_plan(&starts, &kv_lens, &mut plan);
        let rows = prefill.q.tensor.dim(0);
        plan.resize(ops::attention_prefill_plan_len(rows, 9), i32::MAX);
        starts.resize(10, starts[2]);
        kv_lens.resize(9, 0);
        let mut table = fixture.read_i32(&prefill.cache.page_table);
        let width = table.len() / 2;
        table.resize(9 * width, i32::MAX);
        let page_table = device.tensor(&[9, width], &table).expect("a tensor");
        let paged = PagedKv { page_table: &page_table, ..prefill.cache.paged() };
        let (starts, lens, plan) = (fixture.ints(&starts), fixture.ints(&kv_lens), fixture.ints(&plan));
        let (q, scale) = (&prefill.q.tensor, prefill.scale());
        let padded = fixture.run(|cx| ops::attention_prefill(cx, q, &paged, &starts, &lens, &plan, scale));
        assert_eq!(fixture.read(&padded)[..alone.len()], alone, "{dtype}, head dim {head_dim}");
    }
}

/// Attention reads what the kernels before it wrote, and those behind it overwrite that only when it is done.
pub(super) fn prefill_keeps_its_place_between_kernels(device: &Device) {
    for head_dim in [64, 128, 96] {
        let mut fixture = Fixture::new(device);
        let prefill = Prefill::new(&mut fixture, DType::Bf16, &[(130, 0), (20, 60)], (2, 1, head_dim), 16);
        let alone = prefill.run(&mut fixture);
        let plan = prefill_plan(&fixture, &prefill.starts, &prefill.cache.kv_lens);
        let (starts, lens) = (fixture.ints(&prefill.starts), fixture.ints(&prefill.cache.kv_lens));
        let sources = [&prefill.cache.k.tensor, &prefill.cache.v.tensor, &prefill.q.tensor];
        let copies = sources.map(|source| device.zeros(source.shape(), source.dtype()).expect("a tensor"));
        let [k_cache, v_cache, q] = &copies;
        let paged = PagedKv { k_cache, v_cache, page_table: &prefill.cache.page_table };
        let outs = fixture.run(|cx| {
            let mut outs = vec![];
            for _ in 0..4 {
                copies.iter().zip(sources).try_for_each(|(copy, source)| ops::copy_rows(cx, copy, source))?;
                outs.push(ops::attention_prefill(cx, q, &paged, &starts, &lens, &plan, prefill.scale())?);
                copies.iter().try_for_each(|copy| ops::fill(cx, copy, bf16::NAN))?;
            }
            Ok(outs)
        });
        for out in &outs {
            assert_eq!(fixture.read(out)[..alone.len()], alone, "head dim {head_dim}");
        }
    }
}

/// The plan of a decode of these lengths.
fn plan(fixture: &Fixture, kv_lens: &[i32], heads: (usize, usize)) -> Tensor {
    let decode_plan = DecodePlan::new(&fixture.device, heads.0, heads.1);
    let mut values = vec![];
    decode_plan.fill(kv_lens, &mut values);
    fixture.device.tensor(&decode_plan.shape(), &values).expect("a tensor")
}

/// One query attends to every key of its sequence; a sequence without keys (a padded row) gives zeros.
pub(super) fn decode_attends_to_all_keys(device: &Device) {
    // Query heads, key-value heads, head dim, page size.
    let small = [(4, 2, 64, 16), (3, 1, 32, 4), (2, 2, 128, 1), (2, 1, 256, 5), (4, 4, 64, 4), (18, 1, 64, 64)];
    let large = [(32, 8, 128, 16), (16, 8, 128, 64), (8, 1, 128, 1), (40, 8, 64, 16), (24, 2, 128, 4)];
    let small = small.iter().map(|shape| (shape, vec![1, 0, 63, 64, 65, 17, 1003, 128]));
    let large = large.iter().map(|shape| (shape, vec![0, 130, 65, 7]));
    for (&(q_heads, kv_heads, head_dim, page_size), kv_lens) in small.chain(large) {
        for dtype in FLOATS {
            let mut fixture = Fixture::new(device);
            let cache = Cache::new(&mut fixture, dtype, &kv_lens, page_size, (kv_heads, head_dim));
            let q = fixture.random_sliced(kv_lens.len(), q_heads * head_dim, dtype);
            let (scale, lens) = ((head_dim as f32).powf(-0.5), fixture.ints(&kv_lens));
            let plan = plan(&fixture, &kv_lens, (q_heads, kv_heads));
            let mut decode = || {
                let out = fixture.run(|cx| ops::attention_decode(cx, &q.tensor, &cache.paged(), &lens, &plan, scale));
                fixture.read(&out)
            };
            let (first, second) = (decode(), decode());
            let rows = q.values.chunks(q_heads * head_dim).enumerate();
            let expected: Vec<f64> =
                rows.flat_map(|(b, query)| cache.attend(query, b, kv_lens[b] as usize, scale.into())).collect();
            let what = format!("{q_heads}/{kv_heads} heads of {head_dim}, pages of {page_size}");
            assert_close(&what, &first, &expected, dtype, 2.0, 0.5);
            assert_eq!(first, second, "{what}, {dtype}: a plan serves any number of launches");
        }
    }
}

/// Padding a decode with rows without keys changes no bit of the other rows: so a replay is an eager run.
pub(super) fn decode_rows_do_not_depend_on_padded_rows(device: &Device) {
    for (kv_lens, heads) in [(vec![700, 0, 3, 65, 1500], (4, 2)), (vec![2000], (2, 1))] {
        let mut fixture = Fixture::new(device);
        let padded_lens = [&kv_lens[..], &[0; 6]].concat();
        let cache = Cache::new(&mut fixture, DType::Bf16, &padded_lens, 16, (heads.1, 128));
        let q = fixture.random(&[padded_lens.len(), heads.0 * 128], DType::Bf16);
        let mut decode = |kv_lens: &[i32]| {
            let rows = 0..kv_lens.len();
            let table = cache.page_table.rows(rows.clone()).expect("a row range");
            let (paged, q) = (PagedKv { page_table: &table, ..cache.paged() }, q.tensor.rows(rows).expect("rows"));
            let (lens, plan) = (fixture.ints(kv_lens), plan(&fixture, kv_lens, heads));
            let out = fixture.run(|cx| ops::attention_decode(cx, &q, &paged, &lens, &plan, 0.1));
            fixture.read(&out)
        };
        let (alone, padded) = (decode(&kv_lens), decode(&padded_lens));
        assert_eq!(alone, padded[..alone.len()]);
        assert!(padded[alone.len()..].iter().all(|value| *value == 0.0));
    }
}
