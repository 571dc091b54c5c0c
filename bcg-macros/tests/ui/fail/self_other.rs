use bcg_runtime::{Eager, Result, eager_on_graph};

struct Attention;

impl Attention {
    #[eager_on_graph]
    fn run(self: std::sync::Arc<Self>, cx: &mut Eager<'_, ()>) -> Result<()> {
        Ok(())
    }

    #[eager_on_graph]
    fn boxed(self: &Box<Self>, cx: &mut Eager<'_, ()>) -> Result<()> {
        Ok(())
    }
}

fn main() {}
