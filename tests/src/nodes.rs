//! Worlds of several processes: their collectives against plain sums, a forward with breaks that is replayed many times, and
//! how long sums take, beside those of the same devices in one process.
//!
//! `gpu nodes [--devices 0,1] [--nodes 2] [--calls N] [--replays N] [--host]` starts a process for each other node, which is
//! itself with `--node K --at HOST:PORT`. With `--host` it runs on host devices. On many machines, start each node so.

use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bcg_runtime::{Device, ReplayMode, SpanOptions, World, WorldOptions};

use crate::collectives::{Size, collectives_match_plain_sums, timing};
use crate::world;

/// How long ranks wait for each other: the nodes of one run load kernels at different speeds.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Layers of the forward, each with a break and a sum.
const LAYERS: usize = 4;

/// What one run does.
#[derive(Clone, Debug)]
struct Options {
    /// The devices of all nodes, in the order of the ranks.
    devices: Vec<usize>,
    nodes: usize,
    calls: usize,
    replays: u64,
    host: bool,
    /// This node and where node 0 listens, if another process started it.
    node: usize,
    at: Option<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let (devices, calls, replays) = (vec![0, 1], 2000, 10_000);
        let mut options = Self { devices, nodes: 2, calls, replays, host: false, node: 0, at: None };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--devices" => options.devices = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
                "--nodes" => options.nodes = value()?.parse()?,
                "--calls" => options.calls = value()?.parse()?,
                "--replays" => options.replays = value()?.parse()?,
                "--host" => options.host = true,
                "--node" => options.node = value()?.parse()?,
                "--at" => options.at = Some(value()?.clone()),
                other => bail!("unknown option {other}"),
            }
        }
        let (devices, nodes) = (options.devices.len(), options.nodes);
        ensure!(nodes > 1 && devices.is_multiple_of(nodes), "--devices: {devices} devices for --nodes {nodes}");
        Ok(options)
    }

    fn open(&self, numbers: &[usize]) -> Result<Vec<Device>> {
        let open = |number: &usize| if self.host { Ok(Device::host()) } else { Device::cuda(*number) };
        Ok(numbers.iter().map(open).collect::<bcg_runtime::Result<_>>()?)
    }

    /// A world of all nodes, of which every process makes as many in the same order.
    fn world(&self, at: &str) -> Result<World> {
        let num_local = self.devices.len() / self.nodes;
        let devices = self.open(&self.devices[self.node * num_local..][..num_local])?;
        let mut options = WorldOptions::default();
        options.timeout = TIMEOUT;
        Ok(World::spanning(devices, options, &SpanOptions::new(self.nodes, self.node, at))?)
    }
}

/// Waits until all nodes have come so far: one that leaves while others still work is a lost rank.
fn together(world: &World) -> Result<()> {
    world.exchange("the end of a part", Vec::new(), TIMEOUT)?;
    Ok(())
}

/// `gpu nodes`.
///
/// # Errors
/// The first rule that is broken, or the first error of a node.
pub fn main(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    if let Some(at) = &options.at {
        return run(&options, at);
    }
    let at = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let mut others = (1..options.nodes).map(|node| start(args, node, &at)).collect::<Result<Vec<Child>>>()?;
    run(&options, &at)?;
    for (other, node) in others.iter_mut().zip(1..) {
        let status = other.wait()?;
        ensure!(status.success(), "node {node} ended with {status}");
    }
    println!("the same devices in one process:");
    timing::run(&World::new(options.open(&options.devices)?, WorldOptions::default())?)
}

fn start(args: &[String], node: usize, at: &str) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("nodes").args(args).args(["--node", &node.to_string(), "--at", at]);
    command.spawn().context("another node cannot be started")
}

/// What each node does.
fn run(options: &Options, at: &str) -> Result<()> {
    let (begun, is_first) = (Instant::now(), options.node == 0);
    let elements = if options.host { 1 << 14 } else { 1 << 21 };
    let max_delay = Duration::from_micros(300);
    let size = Size { elements, calls: options.calls, max_delay, gathered: false };
    let world = options.world(at)?;
    let num_checked = collectives_match_plain_sums(&world, size)?;
    together(&world)?;
    if is_first {
        println!("{num_checked} results of each rank are right, {:.1} s", begun.elapsed().as_secs_f64());
    }
    for (mode, delays) in [(ReplayMode::Healed, true), (ReplayMode::Healed, false), (ReplayMode::Chain, false)] {
        let begun = Instant::now();
        let (layers, replays, steady) = (LAYERS, options.replays, false);
        let replayed = world::Options { devices: Vec::new(), replays, layers, mode, delays, steady };
        let world = options.world(at)?;
        world::run_in(&world, &replayed)?;
        together(&world)?;
        if is_first {
            let (how, took) = (if delays { ", late at random" } else { "" }, begun.elapsed().as_secs_f64());
            println!("{replays} replays ({mode:?}{how}) are right, {took:.1} s");
        }
    }
    let world = options.world(at)?;
    timing::run(&world)?;
    together(&world)
}
