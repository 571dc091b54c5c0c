//! Random programs: operations, breaks, aliasing views, side streams, sizes and replay orders.
//!
//! Each program runs in three ways: by a naive interpreter on plain vectors, eagerly, and captured and replayed with other
//! live values, other inputs and other numbers of valid rows. All results must be equal, bit for bit: every variable that
//! is alive at the end, every host value, and the persistent tensors.

mod interpret;
mod kernels;
mod program;
pub mod rng;
mod run;

use std::sync::Arc;

use bcg_runtime::{BreakableCudaGraph, Context, Device, Live, ReplayMode, Result, Runner, RunnerOptions, Tensor};

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

/// Runs the program of a seed in all ways.
///
/// # Panics
/// If two results differ or a run fails. The message holds the seed and the shortest failing start of the program.
pub fn check(device: &Device, seed: u64) {
    let program = Program::random(seed);
    let Err(failure) = run_all(device, &program, seed) else { return };
    for len in 1..=program.ops.len() {
        let shorter = Program { ops: program.ops[..len].to_vec(), ..program.clone() };
        if let Err(failure) = run_all(device, &shorter, seed) {
            panic!("seed {seed}: {failure}\nin {}", listing(&shorter));
        }
    }
    panic!("seed {seed}: {failure}\nonce, but not again, in {}", listing(&program));
}

fn listing(program: &Program) -> String {
    let Program { ops, sizes, is_padded, poison, .. } = program;
    let ops: Vec<String> = ops.iter().map(|op| format!("    {op:?}\n")).collect();
    format!("sizes {sizes:?}, padded: {is_padded}, poison: {poison}\n{}", ops.concat())
}

/// One device, one program, all ways to run it.
struct Checker<'a> {
    program: Arc<Program>,
    world: Arc<World>,
    runner: Runner,
    rng: Rng,
    device: &'a Device,
    inputs: Vec<Vec<i32>>,
}

fn run_all(device: &Device, program: &Program, seed: u64) -> Result<(), String> {
    let mut options = RunnerOptions::default();
    options.arena_bytes = 1 << 16;
    options.poison = program.poison;
    let runner = Runner::new(device, options).map_err(|error| error.to_string())?;
    let program = Arc::new(program.clone());
    let mut checker = Checker {
        world: Arc::new(World::new(device)),
        program,
        runner,
        rng: Rng::new(!seed),
        device,
        inputs: Vec::new(),
    };
    checker.run()
}

impl Checker<'_> {
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
        drop(graphs);
        self.device.synchronize().map_err(|error| format!("afterwards: {error}"))
    }

    /// Makes inputs for the coming run and returns its batch.
    fn prepare(&mut self, size: usize) -> Result<Batch, String> {
        let rng = &mut self.rng;
        self.inputs =
            PERSISTENT_COLS.iter().map(|cols| (0..cols * ROWS_MAX).map(|_| rng.below(100) as i32).collect()).collect();
        for (tensor, data) in self.world.persistent.iter().zip(&self.inputs) {
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
        let expected = interpret(&self.program, live, size, &self.inputs);
        if got == expected {
            return Ok(());
        }
        Err(format!("{what} of {size} rows with {live:?}:\ngot      {got:?}\nexpected {expected:?}"))
    }
}
