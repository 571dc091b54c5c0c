use bcg_runtime::{Eager, Result, Tensor, eager_on_graph};

struct Attention;

impl Attention {
    #[eager_on_graph]
    fn run(self: &std::sync::Arc<Self>, cx: &mut Eager<'_, ()>, q: &Tensor) -> Result<Tensor> {
        let rows: usize = q.rows(0..1)?;
        println!("{}", self.num_heads);
        Ok(q.clone())
    }
}

fn main() {}
