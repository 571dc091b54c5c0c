//! Random programs: operations, breaks, aliasing views, side streams, sizes and replay orders.
//!
//! Each program runs in three ways: by a naive interpreter on plain vectors, eagerly, and captured and replayed with other
//! live values, other inputs and other numbers of valid rows. All results must be equal, bit for bit: every variable that
//! is alive at the end, every host value, and the persistent tensors. With several ranks the program has collectives, and the
//! interpreter runs all ranks side by side.

mod collectives;
mod interpret;
mod kernels;
mod program;
pub mod rng;
mod run;

use std::sync::Arc;

use bcg_runtime::{
    BreakableCudaGraph, CommunicatorOptions, Context, Device, Live, RankThreads, ReplayMode, Result, Runner,
    RunnerOptions, Tensor, WorldOptions,
};

use interpret::interpret;
use program::{PERSISTENT_COLS, Program, ROWS_MAX};
use rng::Rng;
use run::{Batch, Outcome, World, forward};

/// Seeds of programs that failed once.
pub const REGRESSIONS: &[u64] = &[
    2,    // two outputs of a break changed places, and the first copy overwrote the second output
    538,  // the copy that avoids this lay where the break had allocated an output
    1267, // one tensor returned three times lay elsewhere at replay
];

type Graph = BreakableCudaGraph<Batch, (Vec<Tensor>, Vec<Live<i32>>)>;

/// Runs the program of a seed in all ways, on one device or on as many ranks as there are devices.
///
/// # Panics
/// If two results differ or a run fails. The message holds the seed and the shortest failing start of the program.
pub fn check(devices: &[Device], seed: u64) {
    let program = Program::random(seed, devices.len());
    let Err(failure) = run_all(devices, &program, seed) else { return };
    for len in 1..=program.ops.len() {
        let shorter = Program { ops: program.ops[..len].to_vec(), ..program.clone() };
        if let Err(failure) = run_all(devices, &shorter, seed) {
            panic!("seed {seed}: {failure}\nin {}", listing(&shorter));
        }
    }
    panic!("seed {seed}: {failure}\nonce, but not again, in {}", listing(&program));
}

fn listing(program: &Program) -> String {
    let Program { ops, sizes, is_padded, poison, num_ranks } = program;
    let ops: Vec<String> = ops.iter().map(|op| format!("    {op:?}\n")).collect();
    format!("{num_ranks} ranks, sizes {sizes:?}, padded: {is_padded}, poison: {poison}\n{}", ops.concat())
}

/// One rank, one program, all ways to run it. All ranks draw the same random numbers, so all do the same.
struct Checker {
    program: Arc<Program>,
    world: Arc<World>,
    runner: Runner,
    rng: Rng,
    /// The inputs of the coming run, of all ranks.
    inputs: Vec<Vec<Vec<i32>>>,
}

fn run_all(devices: &[Device], program: &Program, seed: u64) -> Result<(), String> {
    let program = Arc::new(program.clone());
    let checker = |device: &Device, runner: Result<Runner>| {
        Ok(Checker {
            world: Arc::new(World::new(device)),
            program: Arc::clone(&program),
            runner: runner.map_err(|error| error.to_string())?,
            rng: Rng::new(!seed),
            inputs: Vec::new(),
        })
    };
    let mut options = RunnerOptions::default();
    options.arena_bytes = 1 << 16;
    options.poison = program.poison;
    let ran = match devices {
        [device] => checker(device, Runner::new(device, options))?.run(),
        devices => {
            let in_words = |error: bcg_runtime::Error| error.to_string();
            let world = bcg_runtime::World::new(devices.to_vec(), WorldOptions::default()).map_err(in_words)?;
            let communicators = world.communicators(CommunicatorOptions::default()).map_err(in_words)?;
            let ranks: Result<Vec<Checker>, String> = devices
                .iter()
                .zip(communicators)
                .map(|(device, communicator)| checker(device, Runner::in_world(communicator, options.clone())))
                .collect();
            let mut ranks = RankThreads::start(&world, ranks?).map_err(in_words)?;
            ranks.run(|rank| rank.run().map_err(bcg_runtime::Error::other)).map(drop).map_err(in_words)
        }
    };
    ran?;
    devices.iter().try_for_each(|device| device.synchronize().map_err(|error| format!("afterwards: {error}")))
}

impl Checker {
    fn run(&mut self) -> Result<(), String> {
        let mut graphs = Vec::new();
        for size in self.program.sizes.clone() {
            if self.rng.chance(2) {
                self.eager(size)?;
            }
            graphs.push((size, self.capture(size)?));
        }
        for _ in 0..2 + graphs.len() {
            let at = self.rng.below(graphs.len());
            let (size, graph) = &mut graphs[at];
            self.replay(*size, graph)?;
            if self.rng.chance(4) {
                self.eager(*size)?;
            }
        }
        Ok(())
    }

    /// Makes inputs for the coming run and returns its batch.
    fn prepare(&mut self, size: usize) -> Result<Batch, String> {
        let rng = &mut self.rng;
        let mut tensor = |cols| (0..cols * ROWS_MAX).map(|_| rng.below(100) as i32).collect();
        self.inputs = (0..self.program.num_ranks).map(|_| PERSISTENT_COLS.map(&mut tensor).into()).collect();
        for (tensor, data) in self.world.persistent.iter().zip(&self.inputs[self.runner.rank()]) {
            self.runner.upload(tensor, data).map_err(|error| format!("an upload: {error}"))?;
        }
        Ok(Batch::random(&mut self.rng, &self.program, size))
    }

    fn eager(&mut self, size: usize) -> Result<(), String> {
        let live = self.prepare(size)?;
        let output =
            self.runner.eager(&live, |cx: &mut Context<'_, Batch>| forward(cx, &self.program, &self.world, size));
        self.compare("an eager run", &live, size, output)
    }

    fn capture(&mut self, size: usize) -> Result<Graph, String> {
        let live = Batch { picks_argument: false, ..self.prepare(size)? };
        let mut graph = Graph::new("random");
        let (program, world) = (Arc::clone(&self.program), Arc::clone(&self.world));
        let output = graph.capture(&mut self.runner, &live, move |cx| forward(cx, &program, &world, size));
        self.compare("a capture", &live, size, output)?;
        Ok(graph)
    }

    fn replay(&mut self, size: usize, graph: &mut Graph) -> Result<(), String> {
        if self.rng.chance(4) {
            // Not waited for: the next run is queued behind it.
            self.choose_mode();
            let live = self.prepare(size)?;
            graph.replay(&mut self.runner, &live).map_err(|error| format!("a queued replay with {live:?}: {error}"))?;
        }
        let what = match self.choose_mode() {
            ReplayMode::Healed => "a healed replay",
            ReplayMode::Chain => "a chain replay",
        };
        let live = self.prepare(size)?;
        let output = graph.replay(&mut self.runner, &live);
        self.compare(what, &live, size, output)
    }

    fn choose_mode(&mut self) -> ReplayMode {
        let mode = if self.rng.chance(3) { ReplayMode::Chain } else { ReplayMode::Healed };
        self.runner.set_replay_mode(mode);
        mode
    }

    fn compare(
        &mut self,
        what: &str,
        live: &Batch,
        size: usize,
        output: Result<(Vec<Tensor>, Vec<Live<i32>>)>,
    ) -> Result<(), String> {
        let failed = |error: bcg_runtime::Error| format!("{what} of {size} rows with {live:?}: {error}");
        let (tensors, hosts) = output.map_err(failed)?;
        let mut read = |tensors: &[Tensor]| -> Result<Vec<Vec<i32>>> {
            tensors.iter().map(|tensor| self.runner.read::<i32>(tensor)).collect()
        };
        let got = Outcome {
            tensors: read(&tensors).map_err(failed)?,
            persistent: read(&self.world.persistent).map_err(failed)?,
            hosts: hosts.iter().map(|host| host.get_after(&self.runner)).collect(),
        };
        let rank = self.runner.rank();
        let expected = interpret(&self.program, live, size, &self.inputs).swap_remove(rank);
        if got == expected {
            return Ok(());
        }
        Err(format!("{what} on rank {rank} of {size} rows with {live:?}:\ngot      {got:?}\nexpected {expected:?}"))
    }
}
