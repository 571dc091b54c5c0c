//! How the outputs of a break cross to the captured work after it (law L3).
//!
//! A replayed break allocates at the recorded addresses, so what it returns *is* the bridge and nothing is copied. Only
//! if it returns other memory is that copied into the bridge, and counted.

use crate::arena::FrozenTensor;
use crate::freeze::{Claims, Freeze};
use crate::{CaptureStream, Error, Live, Result, Rows, Tensor};

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
    /// [`Error::Output`] if shape, dtype or structure differ from capture; the driver's.
    fn carry(&self, frozen: &Self::Frozen, carrier: &mut Carrier<'_>) -> Result<()>;
}

/// How deep outputs may nest in an error's path.
const DEPTH_MAX: usize = 8;

/// Carries the outputs of one break into the bridges of its capture.
#[derive(Debug)]
pub struct Carrier<'a> {
    stream: &'a mut CaptureStream,
    path: [PathPart; DEPTH_MAX],
    depth: usize,
}

#[derive(Clone, Copy, Debug)]
enum PathPart {
    Field(&'static str),
    Index(usize),
}

impl<'a> Carrier<'a> {
    pub(crate) fn new(stream: &'a mut CaptureStream) -> Self {
        Self { stream, path: [PathPart::Index(0); DEPTH_MAX], depth: 0 }
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
        if tensor.ptr == frozen.ptr && tensor.row_stride == frozen.row_stride {
            return Ok(());
        }
        let bridge = frozen.thaw(&self.stream.arena().clone());
        self.stream.counts.bridge_copied_bytes += frozen.size_bytes();
        self.stream.copy(&bridge, tensor)
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
pub(crate) fn scrub(stream: &mut CaptureStream, bridges: &[FrozenTensor], rows: Option<Rows>) -> Result<()> {
    let Some(Rows { valid, padded }) = rows.filter(|rows| rows.valid < rows.padded) else { return Ok(()) };
    for bridge in bridges {
        if bridge.shape.dims()[0] != padded {
            continue;
        }
        let size = bridge.dtype.size_bytes();
        let row_bytes = bridge.shape.row_elements() * size;
        stream.scrub_rows(bridge.ptr, row_bytes, bridge.row_stride * size, valid..padded)?;
    }
    Ok(())
}

/// Returns the tensors of an output.
pub(crate) fn output_tensors<R: Freeze>(stream: &mut CaptureStream, output: &R) -> Result<Vec<FrozenTensor>> {
    let mut claims = Claims::new(stream);
    output.freeze(&mut claims)?;
    Ok(claims.tensors)
}
