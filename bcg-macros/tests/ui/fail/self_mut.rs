use bcg_runtime::{Eager, Result, eager_on_graph};

struct Attention {
    calls: usize,
}

impl Attention {
    #[eager_on_graph]
    fn run(&mut self, cx: &mut Eager<'_, ()>) -> Result<()> {
        self.calls += 1;
        Ok(())
    }
}

fn main() {}
