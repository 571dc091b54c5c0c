//! The tensors of a checkpoint, memory-mapped.
//!
//! A model *takes* each tensor once, by name and shape; [`Weights::finish`] refuses what is left over, so that a checkpoint
//! of another architecture, or a part that the wiring forgot, is an error at load and not a wrong answer later.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bcg_runtime::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::TensorInfo;

use crate::error::{Error, Result, read_file};

/// The checkpoint's tensors that were not taken yet, on their way to a device.
pub struct Weights<'a> {
    files: WeightFiles,
    device: &'a Device,
    dtype: DType,
    progress: Option<&'a mut dyn FnMut(usize, usize)>,
}

impl std::fmt::Debug for Weights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights").field("files", &self.files).field("dtype", &self.dtype).finish_non_exhaustive()
    }
}

impl<'a> Weights<'a> {
    /// Maps `model.safetensors`, or the shards of `model.safetensors.index.json`, of the checkpoint in `dir`.
    /// Tensors are converted to `dtype` and uploaded to `device` when they are taken.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Format`] for files that are absent or corrupt; [`Error::MissingTensors`] if the index
    /// names tensors that its shards do not hold.
    pub fn open(dir: &Path, device: &'a Device, dtype: DType) -> Result<Self> {
        Ok(Self { files: WeightFiles::open(dir)?, device, dtype, progress: None })
    }

    /// Calls `progress(bytes taken, bytes in all)` after each tensor.
    #[must_use]
    pub fn with_progress(mut self, progress: &'a mut dyn FnMut(usize, usize)) -> Self {
        self.progress = Some(progress);
        self
    }

    /// The device that tensors go to.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Takes the tensor `name`, which must have `shape`.
    ///
    /// # Errors
    /// [`Error::MissingTensors`], [`Error::TensorMismatch`], or the device's error.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.take_rows(&[(name, shape)])
    }

    /// Takes several tensors and joins them along their first dimension: one matrix product instead of several.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    ///
    /// # Panics
    /// If the shapes differ after the first dimension.
    pub fn take_rows(&mut self, parts: &[(&str, &[usize])]) -> Result<Tensor> {
        let mut shape = parts[0].1.to_vec();
        shape[0] = 0;
        let mut bytes = Vec::new();
        for (name, part) in parts {
            assert_eq!(part[1..], shape[1..], "parts of one matrix have equal rows");
            shape[0] += part[0];
            self.files.take(name, part, self.dtype, &mut bytes)?;
        }
        let tensor = self.device.tensor_from_bytes(&shape, self.dtype, &bytes)?;
        if let Some(progress) = &mut self.progress {
            progress(self.files.bytes_taken, self.files.bytes_total);
        }
        Ok(tensor)
    }

    /// Takes the tensor `name` and drops it, if it is there: for tensors that a checkpoint repeats.
    pub fn skip(&mut self, name: &str) {
        self.files.tensors.remove(name);
    }

    /// Ends the loading.
    ///
    /// # Errors
    /// [`Error::UnusedTensors`] names what no layer took.
    pub fn finish(self) -> Result<()> {
        self.files.finish()
    }
}

/// The host side: mapped files and where each tensor stands in them.
struct WeightFiles {
    dir: PathBuf,
    maps: Vec<memmap2::Mmap>,
    /// Name → file, byte range in it, type and shape.
    tensors: BTreeMap<String, Place>,
    bytes_taken: usize,
    bytes_total: usize,
}

#[derive(Debug)]
struct Place {
    map_idx: usize,
    range: std::ops::Range<usize>,
    info: TensorInfo,
}

impl std::fmt::Debug for WeightFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightFiles").field("dir", &self.dir).field("tensors", &self.tensors.len()).finish()
    }
}

impl WeightFiles {
    fn open(dir: &Path) -> Result<Self> {
        let mut files =
            Self { dir: dir.to_path_buf(), maps: Vec::new(), tensors: BTreeMap::new(), bytes_taken: 0, bytes_total: 0 };
        let index_file = dir.join("model.safetensors.index.json");
        if !index_file.exists() {
            files.map(&dir.join("model.safetensors"))?;
            return Ok(files);
        }
        let index: Index = serde_json::from_slice(&read_file(&index_file)?)
            .map_err(|error| Error::format(&index_file, format!("expected an object `weight_map`: {error}")))?;
        let shards: std::collections::BTreeSet<&String> = index.weight_map.values().collect();
        for shard in shards {
            if Path::new(shard).file_name() != Some(std::ffi::OsStr::new(shard)) {
                return Err(Error::format(&index_file, format!("`{shard}` is not a file name in the same folder")));
            }
            files.map(&dir.join(shard))?;
        }
        let missing: Vec<String> =
            index.weight_map.into_keys().filter(|name| !files.tensors.contains_key(name)).collect();
        if missing.is_empty() { Ok(files) } else { Err(Error::MissingTensors { dir: files.dir, names: missing }) }
    }

    fn map(&mut self, file: &Path) -> Result<()> {
        let map = map_file(file)?;
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| Error::format(file, format!("not a whole safetensors file: {error}")))?;
        // The header is preceded by its own length, in 8 bytes.
        let data_start = 8 + header_bytes;
        for (name, info) in metadata.tensors() {
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            self.bytes_total += range.len();
            let place = Place { map_idx: self.maps.len(), range, info: info.clone() };
            if self.tensors.insert(name.clone(), place).is_some() {
                return Err(Error::format(file, format!("tensor `{name}` is also in another shard")));
            }
        }
        self.maps.push(map);
        Ok(())
    }

    /// Appends the tensor's elements, converted to `dtype`, to `bytes`.
    fn take(&mut self, name: &str, shape: &[usize], dtype: DType, bytes: &mut Vec<u8>) -> Result<()> {
        let Some(place) = self.tensors.remove(name) else {
            return Err(Error::MissingTensors { dir: self.dir.clone(), names: vec![name.to_owned()] });
        };
        if place.info.shape != shape {
            return Err(Error::TensorMismatch {
                name: name.to_owned(),
                expected: format!("shape {shape:?} by config.json"),
                got: format!("{:?}", place.info.shape),
            });
        }
        self.bytes_taken += place.range.len();
        let source = &self.maps[place.map_idx][place.range];
        convert(source, place.info.dtype, dtype, bytes).ok_or_else(|| Error::TensorMismatch {
            name: name.to_owned(),
            expected: format!("bf16, f16 or f32, to be converted to {dtype}"),
            got: format!("{:?}", place.info.dtype),
        })
    }

    fn finish(self) -> Result<()> {
        if self.tensors.is_empty() {
            return Ok(());
        }
        Err(Error::UnusedTensors { dir: self.dir, names: self.tensors.into_keys().collect() })
    }
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[allow(unsafe_code)]
fn map_file(file: &Path) -> Result<memmap2::Mmap> {
    let refuse = |source| Error::File { file: file.to_path_buf(), source };
    let opened = std::fs::File::open(file).map_err(refuse)?;
    // SAFETY: a map may be read as long as nobody changes the file under it. The map lives in `WeightFiles`, which
    // `Weights::finish` consumes at the end of the load; a checkpoint that is overwritten while it loads is the
    // operator's error, as with every program that maps weights. No reference into the map outlives `take`, which copies.
    unsafe { memmap2::Mmap::map(&opened) }.map_err(refuse)
}

/// Appends `source` (little-endian elements of type `from`) to `out` as `to`; `None` if there is no such conversion.
fn convert(source: &[u8], from: safetensors::Dtype, to: DType, out: &mut Vec<u8>) -> Option<()> {
    use safetensors::Dtype as From;
    match (from, to) {
        (From::BF16, DType::Bf16) | (From::F16, DType::F16) | (From::F32, DType::F32) => out.extend_from_slice(source),
        (From::BF16, _) => extend(out, source, to, |bytes: [u8; 2]| bf16::from_le_bytes(bytes).to_f32())?,
        (From::F16, _) => extend(out, source, to, |bytes: [u8; 2]| f16::from_le_bytes(bytes).to_f32())?,
        (From::F32, _) => extend(out, source, to, f32::from_le_bytes)?,
        _ => return None,
    }
    Some(())
}

fn extend<const N: usize>(out: &mut Vec<u8>, source: &[u8], to: DType, read: fn([u8; N]) -> f32) -> Option<()> {
    let (elements, _) = source.as_chunks::<N>();
    out.reserve(elements.len() * to.size_bytes());
    for &element in elements {
        let value = read(element);
        match to {
            DType::Bf16 => out.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
            DType::F16 => out.extend_from_slice(&f16::from_f32(value).to_le_bytes()),
            DType::F32 => out.extend_from_slice(&value.to_le_bytes()),
            DType::I32 | DType::I64 | DType::U8 => return None,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;
    use safetensors::tensor::{Dtype, TensorView};

    fn write(dir: &TempDir, file: &str, tensors: &[(&str, Dtype, &[u8])]) {
        let views = tensors.iter().map(|(name, dtype, bytes)| {
            let view = TensorView::new(*dtype, vec![bytes.len() * 8 / dtype.bitsize()], bytes).expect("a view");
            (name.to_string(), view)
        });
        dir.write(file, &safetensors::serialize(views, None).expect("serialised"));
    }

    fn taken(files: &mut WeightFiles, name: &str, len: usize, dtype: DType) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        files.take(name, &[len], dtype, &mut bytes).map(|()| bytes)
    }

    #[test]
    fn elements_are_kept_or_converted() {
        let dir = TempDir::new("weights-convert");
        let one_f32 = 1.5_f32.to_le_bytes();
        let one_bf16 = bf16::from_f32(1.5).to_le_bytes();
        write(&dir, "model.safetensors", &[("a", Dtype::F32, &one_f32), ("b", Dtype::BF16, &one_bf16)]);
        let mut files = WeightFiles::open(dir.path()).expect("open");
        assert_eq!(taken(&mut files, "a", 1, DType::Bf16).expect("a"), one_bf16);
        assert_eq!(taken(&mut files, "b", 1, DType::Bf16).expect("b"), one_bf16);
        let mut again = WeightFiles::open(dir.path()).expect("open");
        assert_eq!(taken(&mut again, "b", 1, DType::F32).expect("b"), one_f32);
        files.finish().expect("nothing left");
    }

    #[test]
    fn missing_and_left_over_tensors_are_named() {
        let dir = TempDir::new("weights-names");
        write(&dir, "model.safetensors", &[("a", Dtype::F32, &[0; 4]), ("extra", Dtype::F32, &[0; 8])]);
        let mut files = WeightFiles::open(dir.path()).expect("open");
        let missing = taken(&mut files, "absent", 1, DType::F32).expect_err("absent").to_string();
        assert!(missing.contains("1 tensor(s) missing") && missing.contains("`absent`"), "{missing}");
        taken(&mut files, "a", 1, DType::F32).expect("a");
        taken(&mut files, "a", 1, DType::F32).expect_err("taken already");
        let unused = files.finish().expect_err("extra is left").to_string();
        assert!(unused.contains("1 tensor(s)") && unused.contains("`extra`"), "{unused}");
    }

    #[test]
    fn another_shape_or_type_is_an_error() {
        let dir = TempDir::new("weights-shape");
        write(&dir, "model.safetensors", &[("a", Dtype::F32, &[0; 8]), ("i", Dtype::I64, &[0; 8])]);
        let mut files = WeightFiles::open(dir.path()).expect("open");
        let shape = taken(&mut files, "a", 3, DType::F32).expect_err("shape").to_string();
        assert_eq!(shape, "tensor `a`: expected shape [3] by config.json, got [2]");
        let dtype = taken(&mut files, "i", 1, DType::Bf16).expect_err("dtype").to_string();
        assert_eq!(dtype, "tensor `i`: expected bf16, f16 or f32, to be converted to bf16, got I64");
    }

    #[test]
    fn shards_are_joined_and_must_hold_what_the_index_says() {
        let dir = TempDir::new("weights-shards");
        write(&dir, "one.safetensors", &[("a", Dtype::F32, &[0; 4])]);
        write(&dir, "two.safetensors", &[("b", Dtype::F32, &[0; 4])]);
        let index = r#"{"metadata":{},"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
        dir.write("model.safetensors.index.json", index.as_bytes());
        let mut files = WeightFiles::open(dir.path()).expect("open");
        assert_eq!(files.bytes_total, 8);
        taken(&mut files, "b", 1, DType::F32).expect("b");
        dir.write("model.safetensors.index.json", index.replace("\"b\":", "\"c\":").as_bytes());
        let error = WeightFiles::open(dir.path()).expect_err("c is nowhere").to_string();
        assert!(error.contains("`c`"), "{error}");
        dir.write("model.safetensors.index.json", br#"{"weight_map":{"a":"../one.safetensors"}}"#);
        WeightFiles::open(dir.path()).expect_err("a path out of the folder");
    }

    #[test]
    fn a_corrupt_file_is_named() {
        let dir = TempDir::new("weights-corrupt");
        write(&dir, "model.safetensors", &[("a", Dtype::F32, &[0; 4])]);
        let whole = std::fs::read(dir.path().join("model.safetensors")).expect("read");
        for bytes in [&whole[..whole.len() - 1], &whole[..4], b"{}", &[]] {
            dir.write("model.safetensors", bytes);
            let error = WeightFiles::open(dir.path()).expect_err("corrupt").to_string();
            assert!(error.contains("model.safetensors"), "{error}");
        }
        let error = WeightFiles::open(Path::new("/nonexistent")).expect_err("no folder").to_string();
        assert!(error.starts_with("/nonexistent/model.safetensors"), "{error}");
    }
}
