//! The tensors of a checkpoint, on their way to a device.
//!
//! A model *takes* each tensor once, by name and shape, and gets memory whose elements arrive when the loading ends.
//! [`Weights::finish`] refuses what is left over, so that a checkpoint of another architecture, or a part that the
//! wiring forgot, is an error at load and not a wrong answer later.
//!
//! Of several ranks each takes its [`Shard`]: a [`Part`] says how a tensor is divided, and a rank reads the bytes that it
//! keeps, and no others. Of W ranks each keeps `R + K / min(W, Hkv) + D / W` bytes:
//! - R: what every rank needs whole, which are the norms of hidden states, queries and keys, the routers, and the projections
//!   of latent attention to latents, with their norms.
//! - K: `k_proj` and `v_proj` of grouped-query attention with Hkv key-value heads.
//! - D: all else, which are the embedding table, the LM head, the other projections, experts (by their channels, or whole
//!   ones), and all of a state-space mixer.

mod files;
mod part;
mod random;
mod shard;
mod stages;

use std::ops::Range;
use std::path::Path;

use bcg_runtime::{DType, Device, Tensor, UploadOptions, Uploader};

use crate::error::Result;
use files::WeightFiles;
use random::RandomWeights;

pub use part::{Part, Section, Split};
pub(crate) use shard::check as check_shard;
pub use shard::{Divided, Experts, MoeA2a, Shard};
pub use stages::divide_layers;

/// The checkpoint's tensors that were not taken yet.
pub struct Weights<'a> {
    origin: Origin,
    device: &'a Device,
    dtype: DType,
    shard: Shard,
    /// The layers that are taken; `None` takes all.
    layers: Option<Range<usize>>,
    taken_bytes: usize,
    /// What was taken when each layer ended.
    layer_ends: Vec<usize>,
    /// What the last layer of a pipeline needs once more.
    repeated_bytes: usize,
    progress: Option<&'a mut dyn FnMut(usize, usize)>,
}

/// Where elements come from.
#[derive(Debug)]
enum Origin {
    /// Files, uploaded all together at the end.
    Files { files: WeightFiles, uploader: Uploader },
    /// The device makes them up.
    Random(Box<RandomWeights>),
}

impl std::fmt::Debug for Weights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights").field("origin", &self.origin).field("dtype", &self.dtype).finish_non_exhaustive()
    }
}

impl<'a> Weights<'a> {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`, of the checkpoint in `dir`.
    /// Tensors are converted to `dtype` on their way to `device`, which gets the parts of `shard`.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File), [`Error::Format`](crate::Error::Format) for files that are absent or
    /// corrupt; [`Error::MissingTensors`](crate::Error::MissingTensors) if the index names tensors that its shards do
    /// not hold.
    pub fn open(dir: &Path, device: &'a Device, dtype: DType, shard: Shard) -> Result<Self> {
        let uploader = Uploader::new(device, UploadOptions::default());
        let origin = Origin::Files { files: WeightFiles::open(dir)?, uploader };
        Ok(Self::new(origin, device, dtype, shard))
    }

    /// Makes up every tensor that is taken, the same ones each time: to measure a geometry without its checkpoint. What
    /// several ranks keep is the same on all of them; the parts of a divided tensor are not those of the whole one.
    ///
    /// # Errors
    /// The device's.
    pub fn random(device: &'a Device, dtype: DType, shard: Shard) -> Result<Self> {
        let origin = Origin::Random(Box::new(RandomWeights::new(device)?));
        Ok(Self::new(origin, device, dtype, shard))
    }

    /// Leaves every tensor that is taken undefined, for a dry run: on a host device such memory takes none.
    pub(crate) fn unfilled(device: &'a Device, dtype: DType, shard: Shard) -> Self {
        Self::new(Origin::Random(Box::new(RandomWeights::unfilled())), device, dtype, shard)
    }

    fn new(origin: Origin, device: &'a Device, dtype: DType, shard: Shard) -> Self {
        Self {
            origin,
            device,
            dtype,
            shard,
            layers: None,
            taken_bytes: 0,
            layer_ends: Vec::new(),
            repeated_bytes: 0,
            progress: None,
        }
    }

    /// Takes these layers only, with the embedding table if the first layer is among them, and with the final norm and the
    /// LM head if the last one is: a stage of a pipeline. `None` takes all.
    #[must_use]
    pub fn with_layers(mut self, layers: Option<Range<usize>>) -> Self {
        self.layers = layers;
        self
    }

    /// Calls `progress(bytes done, bytes in all)` while [`finish`](Self::finish) writes the tensors.
    #[must_use]
    pub fn with_progress(mut self, progress: &'a mut dyn FnMut(usize, usize)) -> Self {
        self.progress = Some(progress);
        self
    }

    /// The device that tensors go to.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The share of the model that is taken.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// The layers that are taken of a model of `num_layers` layers.
    pub fn layers(&self, num_layers: usize) -> Range<usize> {
        self.layers.clone().unwrap_or(0..num_layers)
    }

    /// Notes that all tensors of the next layer were taken.
    pub fn end_layer(&mut self) {
        self.layer_ends.push(self.taken_bytes);
    }

    /// Notes that a tensor serves the last layer too, whose stage of a pipeline needs one of its own.
    pub fn repeat(&mut self, tensor: &Tensor) {
        self.repeated_bytes += tensor.size_bytes();
    }

    /// The bytes of each layer that was taken: the first one with what was taken before it, the last one with what was
    /// taken after it or is [repeated](Self::repeat).
    pub fn layer_bytes(&self) -> Vec<usize> {
        let mut ends = self.layer_ends.clone();
        if let Some(last) = ends.last_mut() {
            *last = self.taken_bytes + self.repeated_bytes;
        }
        let begins = std::iter::once(0).chain(self.layer_ends.iter().copied());
        ends.iter().zip(begins).map(|(end, begin)| end - begin).collect()
    }

    /// Takes the tensor `name`, which must have `shape`, undivided. Its elements are undefined before
    /// [`finish`](Self::finish).
    ///
    /// # Errors
    /// [`Error::MissingTensors`](crate::Error::MissingTensors),
    /// [`Error::TensorMismatch`](crate::Error::TensorMismatch), or the device's error.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.take_rows(&[Part::whole(name, shape)])
    }

    /// Takes this rank's share of several tensors and joins them along their first dimension: one matrix product instead
    /// of several.
    ///
    /// # Errors
    /// As [`take`](Self::take); [`Error::TensorMismatch`](crate::Error::TensorMismatch) for a tensor that the ranks
    /// cannot divide as its part says.
    ///
    /// # Panics
    /// If the shapes differ after the first dimension.
    pub fn take_rows(&mut self, parts: &[Part<'_>]) -> Result<Tensor> {
        self.take_rows_as(parts, self.dtype)
    }

    /// Takes the tensor `name` undivided as f32, whatever the dtype of the others: one that rounding would spoil.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn take_f32(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.take_rows_as(&[Part::whole(name, shape)], DType::F32)
    }

    fn take_rows_as(&mut self, parts: &[Part<'_>], dtype: DType) -> Result<Tensor> {
        let shard = self.shard;
        let kept = parts.iter().map(|part| part.kept_shape(shard)).collect::<Result<Vec<_>>>()?;
        let mut shape = kept[0].clone();
        assert!(kept.iter().all(|part| part[1..] == shape[1..]), "parts of one matrix have equal rows");
        shape[0] = kept.iter().map(|part| part[0]).sum();
        let mut last = 0;
        let ranges = kept.iter().map(|part| {
            last += part[0];
            last - part[0]..last
        });
        let tensor = match &mut self.origin {
            Origin::Files { files, uploader } => {
                // Before the memory, which a wrong shape may be too large for.
                let sources = parts.iter().map(|part| files.take(part, shard, dtype)).collect::<Result<Vec<_>>>()?;
                let tensor = self.device.empty(&shape, dtype)?;
                ranges.zip(sources).try_for_each(|(rows, source)| uploader.add(&tensor.rows(rows)?, source))?;
                tensor
            }
            Origin::Random(random) => {
                let tensor = self.device.empty(&shape, dtype)?;
                ranges.zip(parts).try_for_each(|(rows, part)| random.fill(&tensor.rows(rows)?, part.number(shard)))?;
                tensor
            }
        };
        self.taken_bytes += tensor.size_bytes();
        Ok(tensor)
    }

    /// Tells whether the tensor `name` can be taken.
    pub fn has(&self, name: &str) -> bool {
        match &self.origin {
            Origin::Files { files, .. } => files.has(name),
            Origin::Random(_) => true,
        }
    }

    /// Leaves the tensor `name` out, if it is there: for tensors that a checkpoint repeats, or that another rank takes.
    pub fn skip(&mut self, name: &str) {
        match &mut self.origin {
            Origin::Files { files, .. } => files.skip(name),
            Origin::Random(random) => random.skip(),
        }
    }

    /// Leaves all tensors out whose names begin with `prefix`: for parts of a checkpoint that its model does not need.
    pub fn skip_all(&mut self, prefix: &str) {
        if let Origin::Files { files, .. } = &mut self.origin {
            files.skip_all(prefix);
        }
    }

    /// Writes all tensors that were taken, and waits until they are on the device.
    ///
    /// # Errors
    /// [`Error::UnusedTensors`](crate::Error::UnusedTensors) names what no layer took, before anything is written;
    /// [`Error::File`](crate::Error::File) for a file that cannot be read any more; the device's.
    pub fn finish(self) -> Result<()> {
        let mut progress = self.progress;
        let mut report = |done, total| {
            if let Some(progress) = &mut progress {
                progress(done, total);
            }
        };
        match self.origin {
            Origin::Files { files, uploader } => {
                files.finish()?;
                let total = uploader.total_bytes();
                report(0, total);
                Ok(uploader.run(&mut |done| report(done, total))?)
            }
            Origin::Random(random) => {
                let total = random.finish()?;
                report(total, total);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;
    use safetensors::tensor::{Dtype, TensorView};

    #[test]
    fn fused_tensors_go_to_their_rows() {
        let dir = TempDir::new("weights-fused");
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let (q, k, norm) = (bytes(&[1.0, 2.0]), bytes(&[3.0, 4.0, 5.0, 6.0]), bytes(&[7.0]));
        let view = |shape: &[usize], bytes| TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("a view");
        let views = [("q", view(&[1, 2], &q)), ("k", view(&[2, 2], &k)), ("norm", view(&[1], &norm))];
        dir.write("model.safetensors", &safetensors::serialize(views, None).expect("serialised"));
        let device = Device::host();
        let mut seen = Vec::new();
        let mut progress = |done, total| seen.push((done, total));
        let mut weights =
            Weights::open(dir.path(), &device, DType::F32, Shard::WHOLE).expect("open").with_progress(&mut progress);
        let qk = weights.take_rows(&[Part::whole("q", &[1, 2]), Part::whole("k", &[2, 2])]).expect("q and k");
        let norm = weights.take("norm", &[1]).expect("norm");
        weights.finish().expect("nothing left");
        assert_eq!(device.read::<f32>(&qk).expect("read"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(device.read::<f32>(&norm).expect("read"), [7.0]);
        assert_eq!((seen[0], seen[seen.len() - 1]), ((0, 28), (28, 28)));
    }

    #[test]
    fn a_shape_that_no_memory_holds_is_named() {
        let dir = TempDir::new("weights-large");
        let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).expect("a view");
        dir.write("model.safetensors", &safetensors::serialize([("a", view)], None).expect("serialised"));
        let device = Device::host();
        let mut weights = Weights::open(dir.path(), &device, DType::F32, Shard::WHOLE).expect("open");
        let error = weights.take("a", &[u32::MAX as usize, u32::MAX as usize]).expect_err("too large").to_string();
        assert_eq!(error, "tensor `a`: expected shape [4294967295, 4294967295] by config.json, got [1]");
    }

    #[test]
    fn random_tensors_are_the_same_each_time_and_have_the_scale_of_their_kind() {
        let device = Device::host();
        let load = || {
            let mut weights = Weights::random(&device, DType::F32, Shard::WHOLE).expect("weights");
            let matrix =
                weights.take_rows(&[Part::whole("a", &[3, 40]), Part::whole("b", &[2, 40])]).expect("a matrix");
            let norm = weights.take("norm", &[40]).expect("a norm");
            weights.finish().expect("nothing can be left");
            (device.read::<f32>(&matrix).expect("read"), device.read::<f32>(&norm).expect("read"))
        };
        let (matrix, norm) = load();
        assert_eq!(load(), (matrix.clone(), norm.clone()));
        assert!(matrix.iter().all(|value| value.abs() < 0.1) && norm.iter().all(|value| (value - 1.0).abs() < 0.1));
        assert_ne!(matrix[..80], matrix[120..], "each part has numbers of its own");
    }
}
