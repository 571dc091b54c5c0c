//! Every option, on functions and methods.
#![deny(warnings)]

use std::sync::Arc;

use bcg_runtime::{Bridge, Context, Eager, Freeze, Result, Tensor, eager_on_graph};

#[eager_on_graph(enable = true)]
fn enabled(cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
    assert!(!cx.is_capturing());
    Ok(x.clone())
}

#[eager_on_graph(enable = false)]
fn disabled(cx: &mut Eager<'_, ()>, x: &Tensor, mut rows: Vec<usize>) -> Result<Tensor> {
    rows.push(1);
    let out = cx.empty(&rows, x.dtype())?;
    Ok(out)
}

fn fake<T: Freeze + Bridge + Clone>(_: &mut Eager<'_, ()>, x: &T) -> Result<T> {
    Ok(x.clone())
}

#[eager_on_graph(stub = fake)]
fn stubbed(cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
    assert!(!cx.is_capturing());
    Ok(x.clone())
}

struct Experts;

impl Experts {
    #[eager_on_graph(rank_coupled, stub = Self::local::<Tensor>)]
    fn all_to_all(self: &Arc<Self>, cx: &mut Eager<'_, ()>, x: &Tensor, owned: Option<Tensor>) -> Result<Tensor> {
        cx.synchronize()?;
        Ok(owned.unwrap_or_else(|| x.clone()))
    }

    fn local<T: Clone>(self: &Arc<Self>, _: &mut Eager<'_, ()>, x: &T, _: Option<Tensor>) -> Result<T> {
        Ok(x.clone())
    }

    #[eager_on_graph(rank_coupled, enable = false,)]
    fn never(self: &Arc<Self>, cx: &mut Eager<'_, ()>) -> Result<usize> {
        assert!(Arc::strong_count(self) > 0);
        cx.synchronize()?;
        Ok(1)
    }
}

fn main() {
    fn run(cx: &mut Context<'_, ()>, experts: &Arc<Experts>, x: &Tensor) -> Result<()> {
        let x = enabled(cx, x)?;
        let x = disabled(cx, &x, vec![2])?;
        let x = stubbed(cx, &x)?;
        let x = experts.all_to_all(cx, &x, None)?;
        let one: usize = experts.never(cx)?;
        x.rows(0..one).map(drop)
    }
    let _ = run;
}
