//! `attention_prefill` and `attention_decode`.

use bcg_models::ops::{self, DecodePlan, PagedKv};
use bcg_runtime::{DType, Device, Tensor};

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

/// Each new token attends to its sequence's prefix and to the new tokens up to itself; padded rows hold anything.
pub(super) fn prefill_attends_to_prefix_and_itself(device: &Device) {
    for dtype in FLOATS {
        for (q_heads, kv_heads, head_dim, page_size) in [(4, 2, 64, 16), (3, 1, 32, 4), (2, 2, 128, 1), (2, 1, 96, 5)] {
            let mut fixture = Fixture::new(device);
            let (new, prefix) = ([5, 1, 9, 3], [0, 7, 16, 40]);
            let kv_lens: Vec<i32> = new.iter().zip(prefix).map(|(n, p)| n + p).collect();
            let cache = Cache::new(&mut fixture, dtype, &kv_lens, page_size, (kv_heads, head_dim));
            let starts = [0, 5, 6, 15, 18];
            let (valid, padded, width) = (18, 21, q_heads * head_dim);
            let mut q = fixture.numbers(valid * width);
            q.resize(padded * width, f64::NAN);
            let q = fixture.floats(&[padded, width], dtype, &q);
            let scale = (head_dim as f32).powf(-0.5);
            let (starts_on_device, lens) = (fixture.ints(&starts), fixture.ints(&kv_lens));
            let out = fixture
                .run(|cx| ops::attention_prefill(cx, &q.tensor, &cache.paged(), &starts_on_device, &lens, scale));
            let actual = fixture.read(&out);
            let mut expected = vec![];
            for b in 0..new.len() {
                for i in 0..new[b] {
                    let row = (starts[b] + i) as usize;
                    let query = &q.values[row * width..(row + 1) * width];
                    expected.extend(cache.attend(query, b, (prefix[b] + i + 1) as usize, scale.into()));
                }
            }
            let what = format!("{q_heads}/{kv_heads} heads of {head_dim}, pages of {page_size}");
            assert_close(&what, &actual[..valid * width], &expected, dtype, 2.0, 0.5);
        }
    }
}

/// A sequence's rows are the same bits alone and in a batch: so batching changes no token.
pub(super) fn prefill_rows_do_not_depend_on_other_sequences(device: &Device) {
    let mut fixture = Fixture::new(device);
    let cache = Cache::new(&mut fixture, DType::Bf16, &[20, 9], 4, (2, 64));
    let width = 4 * 64;
    let q = fixture.random(&[12, width], DType::Bf16);
    let (starts, lens) = (fixture.ints(&[0, 8, 12]), fixture.ints(&cache.kv_lens));
    let both = fixture.run(|cx| ops::attention_prefill(cx, &q.tensor, &cache.paged(), &starts, &lens, 0.125));
    let both = fixture.read(&both);
    let second = q.tensor.rows(8..12).expect("a row range");
    let table = cache.page_table.rows(1..2).expect("a row range");
    let (starts, lens) = (fixture.ints(&[0, 4]), fixture.ints(&[9]));
    let paged = PagedKv { page_table: &table, ..cache.paged() };
    let alone = fixture.run(|cx| ops::attention_prefill(cx, &second, &paged, &starts, &lens, 0.125));
    assert_eq!(fixture.read(&alone), both[8 * width..]);
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
