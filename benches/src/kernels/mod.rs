//! `bcg bench kernels`: every op at the shapes of real models, beside the ceilings of the machine and, if asked, a peer.
//!
//! In the order of the flow: `cases`, and `attention`, `latent`, `mamba` and `moe` for what only some models have, say what is timed and what it must move and compute; `lab`
//! times it on the device; this file makes the table.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use bcg_engine::{DeviceChoice, load};
use bcg_models::ModelConfig;
use clap::Args;
use serde_json::Value;

use super::report::{Cell, Environment, Report};
use super::timing::Samples;
use super::{RoundsArgs, sizes_at_least_one};
use crate::progress::bar;
use attention::{DecodeShape, PrefillShape};
use cases::Case;
use lab::Lab;

mod attention;
mod cases;
mod lab;
mod latent;
mod mamba;
mod moe;

/// Flags of `bcg bench kernels`.
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// Folder with the config.json that says the shapes; may be given several times
    #[arg(long, value_name = "DIR", required = true)]
    pub model: Vec<PathBuf>,

    /// Rows of the ops that work on tokens, separated by commas
    #[arg(long, value_name = "T,T,…", value_delimiter = ',', default_value = "1,16,256,2048,8192")]
    pub tokens: Vec<usize>,

    /// Rows of the ops that work on logits, separated by commas
    #[arg(long, value_name = "B,B,…", value_delimiter = ',', default_value = "1,64,256")]
    pub logits: Vec<usize>,

    /// Batches of prefill attention, separated by commas: sequences x new tokens + tokens of the prefix
    #[arg(
        long,
        value_name = "BxT+P,…",
        value_delimiter = ',',
        default_value = "1x512,1x2048,1x8192,16x512,1x512+8192"
    )]
    pub prefill: Vec<PrefillShape>,

    /// Batches of decode attention, separated by commas: sequences x tokens
    #[arg(
        long,
        value_name = "BxL,…",
        value_delimiter = ',',
        default_value = "1x1024,64x1024,256x1024,1x4096,64x4096,256x4096"
    )]
    pub decode: Vec<DecodeShape>,

    /// Only the ops whose name contains this
    #[arg(long, value_name = "NAME")]
    pub op: Option<String>,

    /// A peer's times, as benches/peers/kernels.py writes them
    #[arg(long, value_name = "FILE")]
    pub peers: Option<PathBuf>,

    /// How often.
    #[command(flatten)]
    pub rounds: RoundsArgs,
}

/// What the columns mean; goes with the table.
const NOTE: &str = "\
us: device time of one launch of the op: a graph of launches on buffers that take turns is replayed back to back, and the \
wall time is divided by the launches. GB/s and TFLOP/s count each input and output once. percent: of the time that the op \
would take at the ceilings, whichever is longer. peer_ratio: the peer's time by this one.";

/// Times the ops.
///
/// # Errors
/// What is wrong with the flags, or that an op failed.
pub fn measure(device: DeviceChoice, args: &KernelsArgs) -> Result<Report> {
    sizes_at_least_one("--tokens", &args.tokens)?;
    sizes_at_least_one("--logits", &args.logits)?;
    ensure!(!args.rounds.profile, "--profile: the times of kernels are what this bench shows anyway; drop it");
    let rounds = args.rounds.rounds()?;
    let peers = args.peers.as_deref().map(Peers::load).transpose()?.unwrap_or_default();
    let mut lab = Lab::new(load::open_device(device)?)?;
    let mut cases = Vec::new();
    for dir in &args.model {
        let config = ModelConfig::load(dir).with_context(|| format!("--model {}", dir.display()))?;
        cases.extend(cases::of_model(&load::folder_name(dir), &config, args)?);
    }
    cases.retain(|case| args.op.as_ref().is_none_or(|op| case.op.contains(op.as_str())));
    ensure!(!cases.is_empty(), "--op: no op has that in its name; drop it to time all");

    let mut report = Report::new(Environment::read(lab.device().name()));
    report.note(NOTE);
    let bar = bar(cases.len() as u64 + 2, "{msg:>17} [{bar:40}] {pos}/{len} {eta}", "timing kernels");
    let mut time = |case: &Case| {
        let samples = lab.time(case, rounds).with_context(|| case.key());
        bar.inc(1);
        samples
    };
    let ceilings = Ceilings::measure(&mut time, &peers)?;
    ceilings.row(&mut report);
    for case in &cases {
        let samples = time(case)?;
        row(&mut report, case, samples, &ceilings, peers.us.get(&case.key()).copied());
    }
    bar.finish_and_clear();
    Ok(report)
}

fn row(report: &mut Report, case: &Case, us: Samples, ceilings: &Ceilings, peer_us: Option<f64>) {
    let median = us.median();
    let rate = |amount: usize, unit: f64| if amount == 0 { None } else { Some(amount as f64 / median / unit) };
    report.row(
        "kernels",
        vec![
            ("op", case.op.into()),
            ("model", case.model.as_str().into()),
            ("shape", case.shape.as_str().into()),
            ("us", us.into()),
            ("gb_per_s", Cell::maybe(rate(case.bytes, 1e3))),
            ("tflop_per_s", Cell::maybe(rate(case.flops, 1e6))),
            ("percent", (100.0 * ceilings.us(case) / median).into()),
            ("peer_us", Cell::maybe(peer_us)),
            ("peer_ratio", Cell::maybe(peer_us.map(|peer_us| peer_us / median))),
        ],
    );
}

/// What the machine can do at most, as far as this run saw it.
struct Ceilings {
    bytes_per_us: f64,
    flops_per_us: f64,
}

impl Ceilings {
    /// Times a large copy and a large matrix product; a faster product of the peer counts instead.
    fn measure(time: &mut dyn FnMut(&Case) -> Result<Samples>, peers: &Peers) -> Result<Self> {
        let (copy, product) = (cases::large_copy(), cases::large_product());
        let (copy_us, product_us) = (time(&copy)?.median(), time(&product)?.median());
        let peer = |case: &Case, us: f64| peers.us.get(&case.key()).copied().unwrap_or(f64::INFINITY).min(us);
        Ok(Self {
            bytes_per_us: copy.bytes as f64 / peer(&copy, copy_us),
            flops_per_us: product.flops as f64 / peer(&product, product_us),
        })
    }

    /// Microseconds that a case takes at least.
    fn us(&self, case: &Case) -> f64 {
        (case.bytes as f64 / self.bytes_per_us).max(case.flops as f64 / self.flops_per_us)
    }

    fn row(&self, report: &mut Report) {
        let (copy, product) = (self.bytes_per_us / 1e3, self.flops_per_us / 1e6);
        report.row("ceilings", vec![("copy_gb_per_s", copy.into()), ("product_tflop_per_s", product.into())]);
    }
}

/// The times of another implementation, by [`Case::key`].
#[derive(Default)]
struct Peers {
    us: BTreeMap<String, f64>,
}

impl Peers {
    fn load(path: &std::path::Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("--peers {}", path.display()))?;
        let json: Value = serde_json::from_str(&text).with_context(|| format!("--peers {}", path.display()))?;
        let times = json["us"].as_object().with_context(|| {
            format!("--peers {}: has no `us`; write the file with benches/peers/kernels.py", path.display())
        })?;
        Ok(Self { us: times.iter().filter_map(|(key, us)| Some((key.clone(), us.as_f64()?))).collect() })
    }
}
