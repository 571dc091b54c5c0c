//! Type and const generics, a where clause, and no other names in scope than those used.
#![deny(warnings)]

use std::sync::Arc;

trait Rows: Send + Sync + 'static {
    fn rows(&self) -> std::ops::Range<usize>;
}

struct FirstRow;

impl Rows for FirstRow {
    fn rows(&self) -> std::ops::Range<usize> {
        0..1
    }
}

#[bcg_runtime::eager_on_graph]
fn select<R: Rows + ?Sized, S, const N: usize>(
    cx: &mut bcg_runtime::Eager<'_, ()>,
    rows: &Arc<R>,
    tensors: &[bcg_runtime::Tensor; N],
    stamp: S,
) -> bcg_runtime::Result<[bcg_runtime::Tensor; N]>
where
    S: bcg_runtime::Freeze + PartialEq,
{
    assert!(stamp == stamp && !cx.is_capturing());
    let mut selected = tensors.clone();
    for tensor in &mut selected {
        *tensor = tensor.rows(rows.rows())?;
    }
    Ok(selected)
}

fn main() {
    fn run(cx: &mut bcg_runtime::Context<'_, ()>, x: &bcg_runtime::Tensor) -> bcg_runtime::Result<()> {
        let dynamic: Arc<dyn Rows> = Arc::new(FirstRow);
        let [_] = select(cx, &dynamic, &[x.clone()], 1u32)?;
        let [_, _] = select(cx, &Arc::new(FirstRow), &[x.clone(), x.clone()], "two")?;
        Ok(())
    }
    let _ = run;
}
