//! How the outputs of a break cross to the captured work after it (law L3).
//!
//! A replayed break allocates at the addresses of its capture, so what it returns *is* the bridge and nothing is
//! copied. Only if it returns other memory is that copied into the bridge, and counted.
//!
//! Invariants:
//! - Only memory that the break itself took at capture is copied into. An output that was an argument, or a persistent
//!   tensor, must be the same one again: a copy would overwrite what others still read.
//! - All outputs are known before the first is copied, so a copy never overwrites an output that is still to be copied.

use crate::capture::freeze::{Freeze, Freezer};
use crate::frozen::FrozenTensor;
use crate::{Error, Live, OpStream, Result, Rows, Tensor};

/// A type that an annotated function may return.
///
/// Implemented for [`Tensor`], [`Live`], `()`, and options, vectors, arrays and tuples of these. `#[derive(Bridge)]`
/// implements it for a struct of such fields (which derives [`Freeze`] too). A plain scalar is not a bridge: captured
/// code could bake it into the graph. Wrap it in [`Live`].
///
/// # Example
/// ```
/// use bcg_runtime::{Bridge, Freeze, Live, Tensor};
///
/// #[derive(Freeze, Bridge)]
/// struct Routed { expert_inputs: Tensor, num_used: Live<usize> }
///
/// fn takes_bridge<T: Bridge>() {}
/// takes_bridge::<(Routed, Option<Tensor>)>();
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be returned by an `#[eager_on_graph]` function",
    label = "this output cannot cross from a break to captured code",
    note = "return a `Tensor`, `Live<T>` for a host value that a later break reads, `()`, or an option, vector or tuple of these; put `#[derive(Freeze, Bridge)]` on your own struct"
)]
pub trait Bridge: Freeze {
    /// Makes the captured output hold this value.
    ///
    /// # Errors
    /// [`Error::Output`] if shape, dtype or structure differ from capture, or if the captured output was an argument or
    /// a persistent tensor and this is other memory; the driver's.
    fn carry(&self, frozen: &Self::Frozen, carrier: &mut Carrier<'_>) -> Result<()>;
}

/// How deep outputs may nest in an error's path.
const DEPTH_MAX: usize = 8;

/// Carries the outputs of one break into the bridges of its capture.
#[derive(Debug)]
pub struct Carrier<'a> {
    stream: &'a mut OpStream,
    path: [PathPart; DEPTH_MAX],
    depth: usize,
    bridges: &'a Bridges,
    /// How many tensors were carried.
    num_carried: usize,
    /// The outputs that must be copied.
    moved: Vec<Moved>,
}

/// The tensors that a break returned at capture, in the order of their fields.
#[derive(Debug)]
pub(crate) struct Bridges {
    pub(crate) tensors: Vec<FrozenTensor>,
    /// The break took the memory itself, so that it may be written at replay.
    pub(crate) is_own: Vec<bool>,
}

/// An output that lies elsewhere than its bridge.
#[derive(Debug)]
struct Moved {
    number: usize,
    from: Tensor,
}

#[derive(Clone, Copy, Debug)]
enum PathPart {
    Field(&'static str),
    Index(usize),
}

impl<'a> Carrier<'a> {
    pub(crate) fn new(stream: &'a mut OpStream, bridges: &'a Bridges) -> Self {
        let path = [PathPart::Index(0); DEPTH_MAX];
        Self { stream, path, depth: 0, bridges, num_carried: 0, moved: Vec::new() }
    }

    /// Carries a field, whose name an error then tells.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn field(&mut self, name: &'static str, f: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.nested(PathPart::Field(name), f)
    }

    /// Carries an element, whose index an error then tells.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn index(&mut self, index: usize, f: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.nested(PathPart::Index(index), f)
    }

    fn nested(&mut self, part: PathPart, f: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if let Some(slot) = self.path.get_mut(self.depth) {
            *slot = part;
        }
        self.depth += 1;
        let result = f(self);
        self.depth -= 1;
        result
    }

    fn mismatch(&self, expected: String, got: String) -> Error {
        let parts = &self.path[..self.depth.min(DEPTH_MAX)];
        let path: String = parts
            .iter()
            .map(|part| match part {
                PathPart::Field(name) => format!(".{name}"),
                PathPart::Index(index) => format!("[{index}]"),
            })
            .collect();
        Error::Output { path: if path.is_empty() { "of the break".to_owned() } else { path }, expected, got }
    }

    fn tensor(&mut self, tensor: &Tensor, frozen: &FrozenTensor) -> Result<()> {
        if tensor.shape != frozen.shape || tensor.dtype != frozen.dtype {
            let expected = format!("{} {:?} as captured", frozen.dtype, frozen.shape);
            return Err(self.mismatch(expected, format!("{} {:?}", tensor.dtype, tensor.shape)));
        }
        self.stream.addr(tensor)?;
        let number = self.num_carried;
        self.num_carried += 1;
        let is_in_place = tensor.ptr == frozen.ptr && tensor.row_stride == frozen.row_stride;
        if is_in_place || tensor.num_elements() == 0 {
            return Ok(());
        }
        if !self.bridges.is_own[number] {
            let expected = "the argument or persistent tensor that was returned at capture".to_owned();
            return Err(self.mismatch(expected, "other memory, which a copy would put in its place".to_owned()));
        }
        self.moved.push(Moved { number, from: tensor.clone() });
        Ok(())
    }

    /// Copies the outputs that lie elsewhere than their bridges.
    pub(crate) fn finish(mut self) -> Result<()> {
        if self.moved.is_empty() {
            return Ok(());
        }
        self.check_sharing()?;
        let bridges = self.bridges;
        let bridge = |moved: &Moved| &bridges.tensors[moved.number];
        let overwrites = |moved: &Moved| {
            let place = Footprint::of_bridge(bridge(moved));
            self.moved.iter().any(|other| place.overlaps(&Footprint::of(&other.from)))
        };
        if self.moved.iter().any(overwrites) {
            // Fresh memory, not that of the break's next claim.
            self.stream.arena().end_serving();
            for moved in &mut self.moved {
                let staged = self.stream.empty(moved.from.shape(), moved.from.dtype())?;
                self.stream.copy(&staged, &moved.from)?;
                moved.from = staged;
            }
        }
        let arena = self.stream.arena().clone();
        for moved in &self.moved {
            self.stream.counts.bridge_copied_bytes += bridge(moved).size_bytes();
            self.stream.copy(&bridge(moved).thaw(&arena), &moved.from)?;
        }
        Ok(())
    }

    /// Outputs that shared memory at capture must share it in the same way now.
    fn check_sharing(&self) -> Result<()> {
        let tensors = &self.bridges.tensors;
        for moved in &self.moved {
            let bridge = &tensors[moved.number];
            for (number, other) in tensors.iter().enumerate() {
                if number == moved.number || !Footprint::of_bridge(bridge).overlaps(&Footprint::of_bridge(other)) {
                    continue;
                }
                let from = self.moved.iter().find(|moved| moved.number == number).map(|moved| &moved.from);
                if !from.is_some_and(|from| is_shared_alike((bridge, &moved.from), (other, from))) {
                    let expected = format!("outputs {} and {number} to share memory, as captured", moved.number);
                    return Err(self.mismatch(expected, "outputs that lie apart".to_owned()));
                }
            }
        }
        Ok(())
    }
}

/// Tells whether two tensors lie to each other as their bridges do, row by row.
fn is_shared_alike((bridge, from): (&FrozenTensor, &Tensor), (other, from_other): (&FrozenTensor, &Tensor)) -> bool {
    let distance = |a: crate::DevicePtr, b: crate::DevicePtr| b.as_u64().wrapping_sub(a.as_u64()) as i64;
    let between_bridges = distance(bridge.ptr, other.ptr);
    let pitch = (bridge.row_stride * bridge.dtype.size_bytes()) as u64;
    let begins_in_same_row = between_bridges.unsigned_abs() < pitch;
    bridge.row_stride == other.row_stride
        && from.row_stride == from_other.row_stride
        && between_bridges == distance(from.ptr, from_other.ptr)
        && (begins_in_same_row || bridge.row_stride == from.row_stride)
}

/// The bytes of a tensor's rows.
struct Footprint {
    start: u64,
    rows: u64,
    row_bytes: u64,
    pitch: u64,
}

impl Footprint {
    fn of(tensor: &Tensor) -> Self {
        let pitch = tensor.row_stride() * tensor.dtype().size_bytes();
        Self {
            start: tensor.ptr.as_u64(),
            rows: tensor.dim(0) as u64,
            row_bytes: tensor.row_bytes() as u64,
            pitch: pitch as u64,
        }
    }

    fn of_bridge(tensor: &FrozenTensor) -> Self {
        let size = tensor.dtype.size_bytes();
        Self {
            start: tensor.ptr.as_u64(),
            rows: tensor.shape.dims()[0] as u64,
            row_bytes: (tensor.shape.row_elements() * size) as u64,
            pitch: (tensor.row_stride * size) as u64,
        }
    }

    fn end(&self) -> u64 {
        self.start + self.rows.saturating_sub(1) * self.pitch + self.row_bytes
    }

    fn is_empty(&self) -> bool {
        self.rows == 0 || self.row_bytes == 0
    }

    fn overlaps(&self, other: &Self) -> bool {
        if self.is_empty() || other.is_empty() || self.end() <= other.start || other.end() <= self.start {
            return false;
        }
        if self.pitch != other.pitch {
            return true;
        }
        // Column ranges of one matrix: rows of the one may lie between rows of the other.
        let offset = (other.start as i64 - self.start as i64).rem_euclid(self.pitch.max(1) as i64) as u64;
        offset < self.row_bytes || offset + other.row_bytes > self.pitch
    }
}

impl Bridge for Tensor {
    fn carry(&self, frozen: &Self::Frozen, carrier: &mut Carrier<'_>) -> Result<()> {
        carrier.tensor(self, &frozen.0)
    }
}

impl<T: Send + 'static> Bridge for Live<T> {
    fn carry(&self, frozen: &Self, _carrier: &mut Carrier<'_>) -> Result<()> {
        frozen.carry_from(self);
        Ok(())
    }
}

impl Bridge for () {
    fn carry(&self, _frozen: &(), _carrier: &mut Carrier<'_>) -> Result<()> {
        Ok(())
    }
}

impl<T: Bridge> Bridge for Option<T> {
    fn carry(&self, frozen: &Self::Frozen, carrier: &mut Carrier<'_>) -> Result<()> {
        match (self, frozen) {
            (Some(value), Some(frozen)) => value.carry(frozen, carrier),
            (None, None) => Ok(()),
            (value, frozen) => {
                let name = |is_some| if is_some { "Some" } else { "None" }.to_owned();
                Err(carrier.mismatch(name(frozen.is_some()), name(value.is_some())))
            }
        }
    }
}

fn carry_all<T: Bridge>(values: &[T], frozen: &[T::Frozen], carrier: &mut Carrier<'_>) -> Result<()> {
    if values.len() != frozen.len() {
        return Err(carrier.mismatch(format!("{} elements", frozen.len()), format!("{}", values.len())));
    }
    let mut pairs = values.iter().zip(frozen).enumerate();
    pairs.try_for_each(|(index, (value, frozen))| carrier.index(index, |carrier| value.carry(frozen, carrier)))
}

impl<T: Bridge> Bridge for Vec<T> {
    fn carry(&self, frozen: &Self::Frozen, carrier: &mut Carrier<'_>) -> Result<()> {
        carry_all(self, frozen, carrier)
    }
}

impl<T: Bridge, const N: usize> Bridge for [T; N] {
    fn carry(&self, frozen: &Self::Frozen, carrier: &mut Carrier<'_>) -> Result<()> {
        carry_all(self, frozen, carrier)
    }
}

macro_rules! bridge_tuples {
    ($(($($T:ident $index:tt),+))*) => { $(
        impl<$($T: Bridge),+> Bridge for ($($T,)+) {
            fn carry(&self, frozen: &Self::Frozen, carrier: &mut Carrier<'_>) -> Result<()> {
                $(carrier.index($index, |carrier| self.$index.carry(&frozen.$index, carrier))?;)+
                Ok(())
            }
        }
    )* };
}

bridge_tuples! {
    (A 0)
    (A 0, B 1)
    (A 0, B 1, C 2)
    (A 0, B 1, C 2, D 3)
    (A 0, B 1, C 2, D 3, E 4)
    (A 0, B 1, C 2, D 3, E 4, F 5)
    (A 0, B 1, C 2, D 3, E 4, F 5, G 6)
    (A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7)
}

/// Zeroes the padded rows of the outputs that have them (law L11).
pub(crate) fn scrub(stream: &mut OpStream, bridges: &[FrozenTensor], rows: Option<Rows>) -> Result<()> {
    let Some(Rows { padded, .. }) = rows.filter(|rows| rows.valid < rows.padded) else { return Ok(()) };
    for bridge in bridges {
        if bridge.shape.dims()[0] != padded {
            continue;
        }
        let size = bridge.dtype.size_bytes();
        let row_bytes = bridge.shape.row_elements() * size;
        stream.scrub_rows(bridge.ptr, padded, row_bytes, bridge.row_stride * size)?;
    }
    Ok(())
}

/// As [`scrub`], for an output of an eager run.
pub(crate) fn scrub_output<R: Freeze>(stream: &mut OpStream, output: &R, rows: Option<Rows>) -> Result<()> {
    if rows.is_none_or(|rows| rows.valid >= rows.padded) {
        return Ok(());
    }
    let scratch = std::mem::take(&mut stream.frozen_scratch);
    let mut freezer = Freezer::with_scratch(stream, scratch);
    let frozen = output.freeze(&mut freezer);
    let mut tensors = freezer.tensors;
    let result = frozen.and_then(|_| scrub(stream, &tensors, rows));
    tensors.clear();
    stream.frozen_scratch = tensors;
    result
}

/// Returns the tensors of an output.
pub(crate) fn output_tensors<R: Freeze>(stream: &mut OpStream, output: &R) -> Result<Vec<FrozenTensor>> {
    let mut freezer = Freezer::new(stream);
    output.freeze(&mut freezer)?;
    Ok(freezer.tensors)
}
