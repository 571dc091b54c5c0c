//! The tuned algorithms on disk: one entry of the cache for each kind of device and version of cuBLASLt.
//!
//! An entry is text: a line that says what it is for, then one line for each shape, its numbers and the 64 bytes of the
//! algorithm. An algorithm is valid for one version of the library only, so the version is in the name and in the first
//! line. What does not read back whole is ignored with a warning, and tuned again.

use std::collections::HashMap;
use std::fmt::Write;

use super::cublaslt::Algorithm;
use crate::DType;
use crate::compile::{Cache, Key};
use crate::device::traits::MatmulShape;

/// The tuned algorithms of earlier processes, and where to keep those of this one.
pub(super) struct PlanFile {
    cache: Option<Cache>,
    entry: String,
    /// The first line of the file.
    header: String,
    plans: HashMap<MatmulShape, Algorithm>,
}

impl PlanFile {
    /// Reads what an earlier process stored for such a device and this version of the library.
    pub(super) fn open(cache: Option<Cache>, device: &str, version: usize) -> Self {
        let header = format!("matmul algorithms of cuBLASLt {version} for {device}");
        let entry = format!("matmul-{}.plans", Key::of(&[header.as_bytes()]).finish());
        let stored = cache.as_ref().and_then(|cache| cache.load(&entry));
        let plans = stored.map_or_else(HashMap::new, |stored| {
            read(&stored, &header).unwrap_or_else(|| {
                tracing::warn!(entry, "cache: not the algorithms of this device and library, tuning again");
                HashMap::new()
            })
        });
        Self { cache, entry, header, plans }
    }

    pub(super) fn get(&self, shape: &MatmulShape) -> Option<Algorithm> {
        self.plans.get(shape).copied()
    }

    /// Stores `plans` beside those that are on disk by now.
    pub(super) fn store(&self, plans: &HashMap<MatmulShape, Algorithm>) {
        let Some(cache) = &self.cache else { return };
        let stored = cache.load(&self.entry).and_then(|stored| read(&stored, &self.header));
        let mut all = stored.unwrap_or_else(|| self.plans.clone());
        all.extend(plans);
        cache.store(&self.entry, write(&all, &self.header).as_bytes());
    }
}

fn write(plans: &HashMap<MatmulShape, Algorithm>, header: &str) -> String {
    let mut lines: Vec<String> = plans.iter().map(|(shape, algorithm)| line(shape, algorithm)).collect();
    lines.sort();
    format!("{header}\n{}", lines.concat())
}

fn line(shape: &MatmulShape, algorithm: &Algorithm) -> String {
    let MatmulShape { rows, outputs, depth, x_stride, weight_stride, out_stride, dtype, out_dtype, alignment } = shape;
    let mut line =
        format!("{rows} {outputs} {depth} {x_stride} {weight_stride} {out_stride} {dtype} {out_dtype} {alignment}");
    for word in algorithm {
        let _ = write!(line, " {word:016x}"); // writing to a string cannot fail
    }
    line.push('\n');
    line
}

fn read(stored: &[u8], header: &str) -> Option<HashMap<MatmulShape, Algorithm>> {
    let lines = std::str::from_utf8(stored).ok()?.strip_prefix(header)?.strip_prefix('\n')?;
    lines.lines().map(parse).collect()
}

fn parse(line: &str) -> Option<(MatmulShape, Algorithm)> {
    let words: Vec<&str> = line.split(' ').collect();
    let [rows, outputs, depth, x_stride, weight_stride, out_stride, dtype, out_dtype, alignment, words @ ..] =
        words.as_slice()
    else {
        return None;
    };
    let shape = MatmulShape {
        rows: rows.parse().ok()?,
        outputs: outputs.parse().ok()?,
        depth: depth.parse().ok()?,
        x_stride: x_stride.parse().ok()?,
        weight_stride: weight_stride.parse().ok()?,
        out_stride: out_stride.parse().ok()?,
        dtype: float(dtype)?,
        out_dtype: float(out_dtype)?,
        alignment: alignment.parse().ok()?,
    };
    let words: Option<Vec<u64>> = words.iter().map(|word| u64::from_str_radix(word, 16).ok()).collect();
    Some((shape, words?.try_into().ok()?))
}

fn float(name: &str) -> Option<DType> {
    [DType::Bf16, DType::F16, DType::F32].into_iter().find(|dtype| dtype.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: &str = "NVIDIA H200, sm_90a, 132 multiprocessors";

    fn shape(rows: usize) -> MatmulShape {
        MatmulShape {
            rows,
            outputs: 6144,
            depth: 4096,
            x_stride: 4096,
            weight_stride: 4104,
            out_stride: 6144,
            dtype: DType::Bf16,
            out_dtype: DType::F32,
            alignment: 256,
        }
    }

    fn cache(name: &str) -> (Cache, std::path::PathBuf) {
        let dir = std::env::temp_dir().join(format!("bcg-plans-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        (Cache::new(&dir), dir)
    }

    fn open(cache: &Cache, version: usize) -> PlanFile {
        PlanFile::open(Some(cache.clone()), DEVICE, version)
    }

    #[test]
    fn what_one_process_stores_the_next_one_reads_and_adds_to() {
        let (cache, dir) = cache("round-trip");
        let algorithm = [u64::MAX, 0, 1, 2, 3, 4, 5, 0xdead_beef];
        let first = open(&cache, 130_200);
        assert_eq!(first.get(&shape(1)), None);
        first.store(&HashMap::from([(shape(1), algorithm)]));
        let second = open(&cache, 130_200);
        assert_eq!((second.get(&shape(1)), second.get(&shape(2))), (Some(algorithm), None));
        first.store(&HashMap::from([(shape(2), [7; 8])])); // another process that began as early as the first
        second.store(&HashMap::from([(shape(1), [8; 8])]));
        let third = open(&cache, 130_200);
        assert_eq!((third.get(&shape(1)), third.get(&shape(2))), (Some([8; 8]), Some([7; 8])));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn another_version_or_device_finds_nothing() {
        let (cache, dir) = cache("version");
        open(&cache, 130_200).store(&HashMap::from([(shape(1), [1; 8])]));
        assert_eq!(open(&cache, 130_201).get(&shape(1)), None);
        assert_eq!(PlanFile::open(Some(cache), "NVIDIA H100", 130_200).get(&shape(1)), None);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn damage_of_any_kind_is_ignored_and_mended_by_the_next_store() {
        let (cache, dir) = cache("damaged");
        let file = open(&cache, 1);
        let whole = write(&HashMap::from([(shape(1), [1; 8])]), &file.header);
        for damaged in [
            whole.replace("6144", "x"),
            whole.replace("bf16", "i32"),
            whole.replace(" 256", ""),
            whole.replace("of cuBLASLt 1", "of cuBLASLt 2"),
            whole.trim_end().strip_suffix('1').unwrap().replace(" 0000000000000001 000000000000000", ""),
            "text".to_owned(),
        ] {
            cache.store(&file.entry, damaged.as_bytes()); // with a sound checksum
            assert_eq!(open(&cache, 1).get(&shape(1)), None, "{damaged}");
        }
        std::fs::write(dir.join(&file.entry), &whole).unwrap(); // without one
        assert_eq!(open(&cache, 1).get(&shape(1)), None);
        open(&cache, 1).store(&HashMap::from([(shape(3), [3; 8])]));
        assert_eq!(open(&cache, 1).get(&shape(3)), Some([3; 8]));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn without_a_cache_nothing_is_kept() {
        let file = PlanFile::open(None, DEVICE, 1);
        file.store(&HashMap::from([(shape(1), [1; 8])]));
        assert_eq!(file.get(&shape(1)), None);
    }
}
