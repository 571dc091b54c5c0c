use bcg_runtime::{Eager, Result, eager_on_graph};

struct Attention {
    num_heads: usize,
}

impl Attention {
    #[eager_on_graph]
    fn run(&self, cx: &mut Eager<'_, ()>) -> Result<()> {
        assert_eq!(self.num_heads, 1);
        Ok(())
    }
}

fn main() {}
