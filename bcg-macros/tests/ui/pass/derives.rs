//! Named, tuple, unit and generic structs; private fields of public structs; many fields; use in a break.
#![deny(warnings, missing_docs, missing_debug_implementations, unreachable_pub, unused_qualifications)]

use std::sync::Arc;

use bcg_runtime::{Bridge, Context, Eager, Freeze, Live, Result, Tensor, eager_on_graph};

#[derive(Clone, Debug, Freeze, Bridge)]
struct Private(Tensor);

/// A public struct with a private field type.
#[derive(Clone, Debug, Freeze, Bridge)]
pub struct Named {
    /// Public.
    pub k: Tensor,
    private: Option<Private>,
    r#type: [Tensor; 2],
}

/// No fields.
#[derive(Clone, Copy, Debug, Freeze, Bridge)]
pub struct Unit;

/// No fields, in braces.
#[derive(Clone, Copy, Debug, Freeze, Bridge)]
pub struct Braces {}

/// Generic.
#[derive(Clone, Debug, Freeze, Bridge)]
pub struct Generic<T: Clone, U = Vec<Tensor>, const N: usize = 2>(T, pub [U; N], Unit)
where
    U: std::fmt::Debug;

/// Bounds come from the fields: `T` itself need not implement `Freeze`.
#[derive(Debug, Freeze)]
pub struct Shared<T: ?Sized + Send + Sync>(Arc<T>);

/// More fields than any tuple implements `Freeze` for.
#[derive(Debug, Freeze)]
pub struct Many {
    f0: usize,
    f1: f32,
    f2: bool,
    f3: char,
    f4: (u8, i64),
    f5: Vec<u32>,
    f6: &'static str,
    f7: Option<usize>,
    f8: Arc<str>,
    f9: Tensor,
    f10: Live<usize>,
    f11: (),
}

#[eager_on_graph]
fn use_all(cx: &mut Eager<'_, ()>, named: &Named, many: Many, shared: &Shared<str>) -> Result<Generic<Named>> {
    let Many { f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11 } = many;
    assert!(f2 && f3 == 'a' && f4 == (1, 2) && f5.len() == f0 && f6.len() == f8.len() && f7.is_none() && f11 == ());
    assert!(f1 > 0.0 && f10.get(cx) == f0 && shared.0.is_empty());
    Ok(Generic(named.clone(), [vec![f9], vec![]], Unit))
}

fn main() {
    fn run(cx: &mut Context<'_, ()>, named: &Named, many: Many) -> Result<Generic<Named>> {
        use_all(cx, named, many, &Shared(Arc::from("")))
    }
    let _ = run;
}
