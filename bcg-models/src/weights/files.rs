//! The safetensors files of a checkpoint: where each tensor stands in them, and how its elements are read.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bcg_runtime::{DType, UploadSource};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::TensorInfo;

use super::part::{Part, Stretches};
use super::shard::Shard;
use crate::checkpoint::{self, INDEX_BYTES_MAX};
use crate::error::{Error, Result};

/// The files, and the place of each tensor that was not taken yet.
pub(super) struct WeightFiles {
    dir: PathBuf,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: Arc<OpenFile>,
    /// Where its first byte stands in the file, in bytes.
    offset: u64,
    info: TensorInfo,
}

#[derive(Debug)]
struct OpenFile {
    file: File,
    path: PathBuf,
    /// The bytes of tensors that were read.
    #[cfg(test)]
    num_read: std::sync::atomic::AtomicUsize,
}

/// The elements that a rank keeps of a tensor, converted while they are read.
#[derive(Debug)]
pub(super) struct FileTensor {
    place: Place,
    /// Which elements, in their order.
    stretches: Vec<Stretches>,
    from: Element,
    to: Element,
}

impl std::fmt::Debug for WeightFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightFiles").field("dir", &self.dir).field("tensors", &self.tensors.len()).finish()
    }
}

impl WeightFiles {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let mut files = Self { dir: dir.to_path_buf(), tensors: BTreeMap::new() };
        let index_file = dir.join("model.safetensors.index.json");
        let Some(index) = checkpoint::read_optional(&index_file, INDEX_BYTES_MAX)? else {
            files.add(&dir.join("model.safetensors"))?;
            return Ok(files);
        };
        let index: Index = serde_json::from_slice(&index)
            .map_err(|error| Error::format(&index_file, format!("expected an object `weight_map`: {error}")))?;
        let shards: std::collections::BTreeSet<&String> = index.weight_map.values().collect();
        for shard in shards {
            if Path::new(shard).file_name() != Some(std::ffi::OsStr::new(shard)) {
                return Err(Error::format(&index_file, format!("`{shard}` is not a file name in the same folder")));
            }
            files.add(&dir.join(shard))?;
        }
        let missing: Vec<String> =
            index.weight_map.into_keys().filter(|name| !files.tensors.contains_key(name)).collect();
        if missing.is_empty() { Ok(files) } else { Err(Error::MissingTensors { dir: files.dir, names: missing }) }
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let refuse = |source| Error::File { file: path.to_path_buf(), source };
        let file = checkpoint::open(path)?;
        let map = map(&file).map_err(refuse)?;
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| Error::format(path, format!("not a whole safetensors file: {error}")))?;
        let file = Arc::new(OpenFile {
            file,
            path: path.to_path_buf(),
            #[cfg(test)]
            num_read: Default::default(),
        });
        for (name, info) in metadata.tensors() {
            // The header is preceded by its own length, in 8 bytes.
            let offset = (8 + header_bytes + info.data_offsets.0) as u64;
            let place = Place { file: Arc::clone(&file), offset, info: info.clone() };
            if self.tensors.insert(name.clone(), place).is_some() {
                return Err(Error::format(path, format!("tensor `{name}` is also in another shard")));
            }
        }
        Ok(())
    }

    /// Takes a tensor, of which the part of `shard`, which divides it, is to be read as `dtype`.
    pub(super) fn take(&mut self, part: &Part<'_>, shard: Shard, dtype: DType) -> Result<FileTensor> {
        let Part { name, shape, .. } = *part;
        let Some(place) = self.tensors.remove(name) else {
            return Err(Error::MissingTensors { dir: self.dir.clone(), names: vec![name.to_owned()] });
        };
        let mismatch = |expected, got| Error::TensorMismatch { name: name.to_owned(), expected, got };
        if place.info.shape != shape {
            return Err(mismatch(format!("shape {shape:?} by config.json"), format!("{:?}", place.info.shape)));
        }
        let from = match place.info.dtype {
            safetensors::Dtype::BF16 => Some(DType::Bf16),
            safetensors::Dtype::F16 => Some(DType::F16),
            safetensors::Dtype::F32 => Some(DType::F32),
            _ => None,
        };
        match (from.and_then(Element::of), Element::of(dtype)) {
            (Some(from), Some(to)) => Ok(FileTensor { place, stretches: part.stretches(shard), from, to }),
            _ => Err(mismatch(
                format!("bf16, f16 or f32, to be converted to {dtype}"),
                format!("{:?}", place.info.dtype),
            )),
        }
    }

    /// Tells whether a tensor is there that was not taken.
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(super) fn skip(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    pub(super) fn skip_all(&mut self, prefix: &str) {
        self.tensors.retain(|name, _| !name.starts_with(prefix));
    }

    /// Refuses tensors that were not taken.
    pub(super) fn finish(self) -> Result<()> {
        if self.tensors.is_empty() {
            return Ok(());
        }
        Err(Error::UnusedTensors { dir: self.dir, names: self.tensors.into_keys().collect() })
    }
}

impl UploadSource for FileTensor {
    fn read(&self, offset: usize, mut into: &mut [u8]) -> bcg_runtime::Result<()> {
        let size = self.to.size_bytes();
        let mut at = offset / size; // elements from the beginning of the next stretches
        for stretches in &self.stretches {
            let Stretches { first, len, stride, count } = *stretches;
            while at < len * count && !into.is_empty() {
                let (stretch, begin) = (at / len, at % len);
                let elements = (len - begin).min(into.len() / size);
                let (now, later) = into.split_at_mut(elements * size);
                self.read_elements(first + stretch * stride + begin, now)?;
                (at, into) = (at + elements, later);
            }
            at = at.saturating_sub(len * count);
        }
        Ok(())
    }
}

impl FileTensor {
    /// Reads elements that stand together, from the element `first` of the tensor on.
    fn read_elements(&self, first: usize, into: &mut [u8]) -> bcg_runtime::Result<()> {
        let (from, to) = (self.from.size_bytes(), self.to.size_bytes());
        if self.from == self.to {
            return self.place.read(first * from, into);
        }
        let mut source = vec![0; into.len() / to * from];
        self.place.read(first * from, &mut source)?;
        for (into, source) in into.chunks_exact_mut(to).zip(source.chunks_exact(from)) {
            self.to.write(self.from.read(source), into);
        }
        Ok(())
    }
}

impl Place {
    fn read(&self, offset: usize, into: &mut [u8]) -> bcg_runtime::Result<()> {
        let OpenFile { file, path, .. } = &*self.file;
        #[cfg(test)]
        self.file.num_read.fetch_add(into.len(), std::sync::atomic::Ordering::Relaxed);
        let read = file.read_exact_at(into, self.offset + offset as u64);
        read.map_err(|source| bcg_runtime::Error::other(Error::File { file: path.clone(), source }))
    }
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: a map may be read as long as nobody changes the file under it. `WeightFiles::add` reads the header
    // through it, copies what it needs, and drops it; a checkpoint that is overwritten just then is the operator's
    // error, as with every program that maps weights.
    unsafe { memmap2::Mmap::map(file) }
}

/// An element type that weights may have, in a file or on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    Bf16,
    F16,
    F32,
}

impl Element {
    fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::Bf16 => Some(Self::Bf16),
            DType::F16 => Some(Self::F16),
            DType::F32 => Some(Self::F32),
            DType::I32 | DType::I64 | DType::U8 => None,
        }
    }

    fn size_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Reads one little-endian element.
    fn read(self, bytes: &[u8]) -> f32 {
        match self {
            Self::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Self::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Self::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        }
    }

    fn write(self, value: f32, bytes: &mut [u8]) {
        match self {
            Self::Bf16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            Self::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            Self::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::part::{Section, Split};
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
        let tensor = files.take(&Part::whole(name, &[len]), Shard::WHOLE, dtype)?;
        let mut bytes = vec![0; len * dtype.size_bytes()];
        tensor.read(0, &mut bytes)?;
        Ok(bytes)
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
    fn a_part_of_a_tensor_is_read_from_its_place() {
        let dir = TempDir::new("weights-part");
        let values: Vec<u8> = (0..10).flat_map(|i| bf16::from_f32(i as f32).to_le_bytes()).collect();
        write(&dir, "model.safetensors", &[("a", Dtype::F32, &[0; 12]), ("b", Dtype::BF16, &values)]);
        let mut files = WeightFiles::open(dir.path()).expect("open");
        let tensor = files.take(&Part::whole("b", &[10]), Shard::WHOLE, DType::F32).expect("b");
        let mut bytes = [0; 8];
        tensor.read(12, &mut bytes).expect("elements 3 and 4");
        assert_eq!(bytes, bytemuck::cast::<[f32; 2], [u8; 8]>([3.0, 4.0]));
        std::fs::OpenOptions::new()
            .write(true)
            .open(dir.path().join("model.safetensors"))
            .and_then(|file| file.set_len(20))
            .expect("cut short");
        let error = tensor.read(12, &mut bytes).expect_err("cut short").to_string();
        assert!(error.contains("model.safetensors: cannot be read"), "{error}");
    }

    /// Whatever pieces it is read in, a rank's part has its elements, and nothing else of the file is read.
    #[test]
    fn a_rank_reads_the_bytes_of_its_part_alone() {
        let dir = TempDir::new("weights-ranks");
        let values: Vec<u8> = (0..96).flat_map(|i| bf16::from_f32(i as f32).to_le_bytes()).collect();
        let view = TensorView::new(Dtype::BF16, vec![8, 12], &values).expect("a view");
        dir.write("model.safetensors", &safetensors::serialize([("a", view)], None).expect("serialised"));
        let sections = [Section { units: 2, rows: 1 }, Section { units: 2, rows: 3 }];
        let rows_of = |rank: usize| -> Vec<usize> {
            (0..8)
                .filter(|row| [0, 1, 0, 0, 0, 1, 1, 1][*row] == rank)
                .flat_map(|row| 12 * row..12 * (row + 1))
                .collect()
        };
        let columns_of = |rank: usize| -> Vec<usize> { (0..96).filter(|i| i % 12 / 6 == rank).collect() };
        for rank in 0..2 {
            for (split, expected) in [(Split::Rows(&sections), rows_of(rank)), (Split::Columns, columns_of(rank))] {
                let expected: Vec<f32> = expected.into_iter().map(|i| i as f32).collect();
                for dtype in [DType::Bf16, DType::F32] {
                    for piece in [8, 16, 40, 104, 192] {
                        let mut files = WeightFiles::open(dir.path()).expect("open");
                        let part = Part { name: "a", shape: &[8, 12], split };
                        let tensor = files.take(&part, Shard::new(rank, 2), dtype).expect("a part");
                        let mut bytes = vec![0; 48 * dtype.size_bytes()];
                        for (i, piece_of) in bytes.chunks_mut(piece).enumerate() {
                            tensor.read(i * piece, piece_of).expect("a piece");
                        }
                        let element = |bytes: &[u8]| Element::of(dtype).expect("a float").read(bytes);
                        let got: Vec<f32> = bytes.chunks(dtype.size_bytes()).map(element).collect();
                        assert_eq!(got, expected, "rank {rank}, {split:?}, {dtype}, pieces of {piece} bytes");
                        assert_eq!(tensor.place.file.num_read.load(std::sync::atomic::Ordering::Relaxed), 96);
                    }
                }
            }
        }
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
