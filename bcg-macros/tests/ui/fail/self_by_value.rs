use bcg_runtime::{Eager, Result, eager_on_graph};

struct Attention;

impl Attention {
    #[eager_on_graph]
    fn run(self, cx: &mut Eager<'_, ()>) -> Result<()> {
        Ok(())
    }
}

fn main() {}
