//! Latent attention, and the writes of its cache.

mod latent_kv;

pub use latent_kv::LatentKv;

ops! {
    decode,
    kv_write,
    prefill,
}
