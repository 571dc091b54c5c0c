//! A forward of several ranks, replayed many times: the work that the `gpu` binary replays on GPUs.

use bcg_runtime::{Device, ReplayMode};
use bcg_tests::world::{Options, run};

#[test]
fn many_replays_of_several_ranks_are_right() {
    for (num_ranks, mode) in [(2, ReplayMode::Healed), (4, ReplayMode::Healed), (2, ReplayMode::Chain)] {
        let options = Options { devices: Vec::new(), replays: 300, layers: 3, mode, delays: true, steady: false };
        let devices = (0..num_ranks).map(|_| Device::host()).collect();
        run(devices, &options).expect("every replay is right");
    }
}
