//! The rules of collectives on host devices, with several numbers of ranks and late, seeded schedules of each; the `gpu` binary
//! runs them on CUDA.

use std::net::TcpListener;
use std::time::Duration;

use bcg_runtime::{Device, HostOptions, SpanOptions, World, WorldOptions};
use bcg_tests::collectives::{Size, a_rank_that_does_not_come_is_lost, collectives_match_plain_sums};

fn devices(num_ranks: usize) -> Vec<Device> {
    let device = |rank| {
        let mut options = HostOptions::default();
        options.seed = rank as u64;
        Device::host_with(options)
    };
    (0..num_ranks).map(device).collect()
}

fn patient(timeout: Duration) -> WorldOptions {
    let mut options = WorldOptions::default();
    options.timeout = timeout;
    options
}

fn world(num_ranks: usize, timeout: Duration) -> World {
    World::new(devices(num_ranks), patient(timeout)).expect("a world")
}

/// Calls `f` with the world of each of several nodes, which are threads here, at once.
fn on_nodes<R: Send>(num_nodes: usize, num_local: usize, timeout: Duration, f: impl Fn(&World) -> R + Sync) -> Vec<R> {
    let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    std::thread::scope(|scope| {
        let start = |node| {
            let span = SpanOptions::new(num_nodes, node, address.to_string());
            let world = World::spanning(devices(num_local), patient(timeout), &span).expect("a world");
            let result = f(&world);
            // A node that leaves while another one still works would be a lost rank.
            (result, world)
        };
        let threads: Vec<_> = (0..num_nodes).map(|node| scope.spawn(move || start(node))).collect();
        let (results, worlds): (_, Vec<World>) =
            threads.into_iter().map(|thread| thread.join().expect("no panic")).unzip();
        drop(worlds);
        results
    })
}

#[test]
fn collectives_match_plain_sums_on_host_devices() {
    for (num_ranks, gathered) in [(2, false), (3, false), (4, false), (8, false), (2, true), (3, true)] {
        let size = Size { elements: 9000, calls: 200, max_delay: Duration::from_micros(100), gathered };
        let world = world(num_ranks, Duration::from_secs(30));
        let num_checked = collectives_match_plain_sums(&world, size).expect("every result is right");
        println!("{num_ranks} ranks: {num_checked} results");
    }
}

#[test]
fn a_rank_that_does_not_come_is_lost_on_host_devices() {
    for num_ranks in [2, 4] {
        let world = world(num_ranks, Duration::from_secs(1));
        a_rank_that_does_not_come_is_lost(&world).expect("all ranks are told");
    }
}

#[test]
fn collectives_of_several_nodes_match_plain_sums() {
    for (num_nodes, num_local) in [(2, 1), (2, 2), (3, 1)] {
        let size = Size { elements: 9000, calls: 100, max_delay: Duration::from_micros(100), gathered: num_local > 1 };
        let checked = on_nodes(num_nodes, num_local, Duration::from_secs(30), |world| {
            collectives_match_plain_sums(world, size).expect("every result is right")
        });
        println!("{num_nodes} nodes of {num_local} ranks: {checked:?} results");
    }
}

#[test]
fn a_rank_of_another_node_that_does_not_come_is_lost() {
    on_nodes(2, 1, Duration::from_secs(1), |world| {
        a_rank_that_does_not_come_is_lost(world).expect("all ranks are told");
    });
}
