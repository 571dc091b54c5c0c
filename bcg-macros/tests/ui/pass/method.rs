//! Receivers `self: &Arc<Self>` and `&self`, a generic impl, an associated function, and `self` in every place.
#![deny(warnings)]

use std::sync::Arc;

use bcg_runtime::{Context, Eager, Freeze, LiveBatch, Result, Tensor, eager_on_graph};

struct Batch;

impl LiveBatch for Batch {}

#[derive(Debug)]
struct Attention<T> {
    num_heads: usize,
    inner: T,
}

impl<T: Send + Sync + std::fmt::Debug + 'static> Attention<T> {
    #[eager_on_graph]
    fn run(self: &Arc<Self>, cx: &mut Eager<'_, Batch>, q: &Tensor) -> Result<Tensor> {
        struct Local(usize);
        impl Local {
            fn get(&self) -> usize {
                self.0
            }
        }
        let by_closure = || self.num_heads;
        let text = format!("{self:?} {self:#?} {}", self.num_heads);
        assert!(!text.is_empty() && Local(by_closure()).get() == self.num_heads);
        let Self { num_heads, inner } = &**self;
        assert!(std::mem::size_of_val(inner) < 1000);
        let _: &Batch = cx.live();
        self::rows(q, *num_heads)
    }

    #[eager_on_graph]
    fn associated(cx: &mut Eager<'_, Batch>, this: &Arc<Self>, other: &Arc<T>) -> Result<()> {
        assert!(Arc::strong_count(this) > 0 && Arc::strong_count(other) > 0);
        let _: &T = &this.inner;
        cx.synchronize()
    }
}

fn rows(q: &Tensor, num: usize) -> Result<Tensor> {
    q.rows(0..num)
}

#[derive(Clone, Freeze)]
struct Cache {
    k: Tensor,
}

impl Cache {
    #[eager_on_graph]
    pub(crate) fn k(&self, cx: &mut Eager<'_, Batch>) -> Result<Tensor> {
        assert!(!cx.is_capturing());
        Ok(self.k.clone())
    }
}

fn main() {
    fn run(cx: &mut Context<'_, Batch>, attention: &Arc<Attention<u8>>, cache: &Cache) -> Result<Tensor> {
        Attention::associated(cx, attention, &Arc::new(1))?;
        let k = cache.k(cx)?;
        attention.run(cx, &k)
    }
    let _ = run;
}
