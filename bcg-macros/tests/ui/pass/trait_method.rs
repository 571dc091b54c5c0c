//! A method of a trait: declared with `Context`, implemented with `Eager`; and a provided method.
#![deny(warnings)]

use std::sync::Arc;

use bcg_runtime::{Context, Eager, Result, Tensor, eager_on_graph};

trait Mixer: Send + Sync + 'static {
    const ROWS: usize;

    fn mix(self: &Arc<Self>, cx: &mut Context<'_, ()>, x: &Tensor) -> Result<Tensor>;

    #[eager_on_graph]
    fn mix_twice(self: &Arc<Self>, cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor>
    where
        Self: Sized,
    {
        let once = self.mix(cx, x)?;
        self.mix(cx, &once)
    }
}

struct Scan<T>(T);

impl<T: Send + Sync + 'static> Mixer for Scan<T> {
    const ROWS: usize = 1;

    #[eager_on_graph]
    fn mix(self: &Arc<Self>, cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
        let _: &T = &self.0;
        assert!(!cx.is_capturing());
        x.rows(0..Self::ROWS)
    }
}

fn main() {
    fn run(cx: &mut Context<'_, ()>, scan: &Arc<Scan<u8>>, x: &Tensor) -> Result<Tensor> {
        scan.mix_twice(cx, x)
    }
    let _ = run;
}
