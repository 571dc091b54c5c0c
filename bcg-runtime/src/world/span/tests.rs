//! Nodes as threads of one process, over the loopback network.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::frame::{Kind, Writer, send};
use super::{PROTOCOL, SpanOptions, join};
use crate::{Device, Error, Result, World, WorldOptions};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it has one").to_string()
}

fn options(num_nodes: usize, node: usize, address: &str) -> SpanOptions {
    let mut options = SpanOptions::new(num_nodes, node, address);
    options.join_timeout = PATIENCE;
    options.same = vec![("model".to_owned(), "tiny".to_owned())];
    options
}

fn world(span: &SpanOptions) -> Result<World> {
    world_within(span, Duration::from_secs(4))
}

fn world_within(span: &SpanOptions, timeout: Duration) -> Result<World> {
    World::spanning(vec![Device::host()], WorldOptions { timeout }, span)
}

/// Node 0, and the other end of its connection to a node 1 that does nothing on its own.
fn node_and_stranger(timeout: Duration) -> (World, TcpStream) {
    let address = free_address();
    let rows = [
        ("version of the protocol", PROTOCOL),
        ("number of nodes", "2"),
        ("number of ranks on each node", "1"),
        ("kind of devices", &crate::world::describe(&Device::host())),
        ("model", "tiny"),
    ];
    let rows = rows.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    std::thread::scope(|scope| {
        let (first, second) = (options(2, 0, &address), options(2, 1, &address));
        let node = scope.spawn(move || world_within(&first, timeout).expect("they come together"));
        let stranger = join::join(&second, &rows).expect("they come together").swap_remove(0).expect("a connection");
        (node.join().expect("no panic"), stranger)
    })
}

/// Makes the nodes of these options at once.
fn worlds(all: &[SpanOptions]) -> Vec<Result<World>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|options| scope.spawn(|| world(options))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

fn together(num_nodes: usize) -> Vec<World> {
    let address = free_address();
    let all: Vec<_> = (0..num_nodes).map(|node| options(num_nodes, node, &address)).collect();
    worlds(&all).into_iter().map(|world| world.expect("they come together")).collect()
}

fn on_each<R: Send>(worlds: &[World], f: impl Fn(&World) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = worlds.iter().map(|world| scope.spawn(|| f(world))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

#[track_caller]
fn eventually_lost(world: &World, rank: usize, cause: &str) {
    let begun = Instant::now();
    while world.lost().is_none() {
        assert!(begun.elapsed() < PATIENCE, "never lost");
        std::thread::sleep(Duration::from_millis(5));
    }
    match world.lost() {
        Some(Error::RankLost { rank: lost, cause: why, .. }) if lost == rank && why.contains(cause) => {}
        lost => panic!("rank {rank}, {cause}: {lost:?}"),
    }
}

#[test]
fn nodes_say_and_hear_in_order_and_take_commands() {
    let worlds = together(3);
    assert_eq!(worlds.iter().map(World::first_rank).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(worlds.iter().all(|world| (world.size(), world.num_local(), world.num_nodes()) == (3, 1, 3)));
    for turn in 0..20u8 {
        let said =
            on_each(&worlds, |world| world.exchange("a turn", vec![turn, world.node() as u8], PATIENCE).unwrap());
        assert!(said.iter().all(|said| *said == [[turn, 0], [turn, 1], [turn, 2]]), "{said:?}");
    }
    worlds[0].command(b"one").unwrap();
    worlds[0].command(b"two").unwrap();
    for world in &worlds[1..] {
        assert_eq!(world.next_command().unwrap().as_deref(), Some(b"one".as_slice()));
        assert_eq!(world.next_command().unwrap().as_deref(), Some(b"two".as_slice()));
    }
    let mut worlds = worlds.into_iter();
    drop(worlds.next());
    worlds.for_each(|world| assert_eq!(world.next_command().unwrap(), None, "node 0 has left in order"));
}

#[test]
fn nodes_that_were_started_otherwise_are_refused_on_both_sides() {
    let refused = |change: fn(&mut SpanOptions), why: &str| {
        let address = free_address();
        let mut other = options(2, 1, &address);
        change(&mut other);
        for world in worlds(&[options(2, 0, &address), other]) {
            match world {
                Err(Error::Nodes(message)) => assert!(message.contains(why), "{message}"),
                other => panic!("{why}: {other:?}"),
            }
        }
    };
    refused(|other| other.num_nodes = 3, "same number of nodes: node 0 has 2, node 1 has 3");
    refused(|other| other.same[0].1 = "large".to_owned(), "same model: node 0 has tiny, node 1 has large");
    refused(|other| other.same.clear(), "same model: node 0 has tiny, node 1 has nothing");
    for (num_nodes, node) in [(2, 2), (1, 0), (9, 0)] {
        let error = world(&options(num_nodes, node, "127.0.0.1:1")).unwrap_err();
        assert!(matches!(error, Error::Option { .. }), "{error}");
    }
}

#[test]
fn a_node_that_does_not_come_is_named_in_time() {
    let address = free_address();
    let mut alone = options(2, 0, &address);
    alone.join_timeout = Duration::from_millis(100);
    let error = world(&alone).unwrap_err().to_string();
    assert!(error.contains("node 1 did not come"), "{error}");
    alone.node = 1;
    let error = world(&alone).unwrap_err().to_string();
    assert!(error.contains("did not reach node 0") && error.contains(&address), "{error}");
    alone.address = "nowhere".to_owned();
    let error = world(&alone).unwrap_err().to_string();
    assert!(error.contains("give HOST:PORT"), "{error}");
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    alone.address = server.local_addr().unwrap().to_string();
    alone.join_timeout = PATIENCE;
    let error = std::thread::scope(|scope| {
        scope.spawn(|| server.accept().unwrap().0.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap());
        world(&alone).unwrap_err().to_string()
    });
    assert!(error.contains("is no node 0"), "{error}");
}

#[test]
fn clients_that_are_no_nodes_hinder_nobody() {
    let address = free_address();
    let (first, second) = (options(2, 0, &address), options(2, 1, &address));
    std::thread::scope(|scope| {
        let node = scope.spawn(|| world(&first));
        let connect = || loop {
            match TcpStream::connect(&address) {
                Ok(stream) => return stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let _mute: Vec<_> = (0..8).map(|_| connect()).collect();
        let mut web = connect();
        web.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut half = connect();
        half.write_all(&[0xb0, 200, 0, 0, 0, 1, 2, 3]).unwrap();
        let mut wrong = connect();
        wrong.write_all(&[0xb0, 8, 0, 0, 0, 255, 255, 255, 255, 1, 2, 3, 4]).unwrap();
        assert_eq!(web.read(&mut [0; 8]).unwrap_or(0), 0, "it is turned away");
        assert_eq!(wrong.read(&mut [0; 8]).unwrap_or(0), 0, "it is turned away");
        let other = world(&second).expect("node 1 comes in between");
        let node = node.join().expect("no panic").expect("node 0 takes it");
        let said = on_each(&[node, other], |world| world.exchange("a turn", Vec::new(), PATIENCE));
        assert!(said.iter().all(Result::is_ok), "{said:?}");
    });
}

#[test]
fn a_second_process_with_the_same_rank_is_turned_away() {
    let address = free_address();
    let nodes = [options(3, 0, &address), options(3, 1, &address)];
    std::thread::scope(|scope| {
        let threads = nodes.each_ref().map(|options| scope.spawn(|| world(options)));
        std::thread::sleep(Duration::from_millis(300));
        let error = world(&nodes[1]).unwrap_err().to_string();
        assert!(error.contains("node 1 is there already"), "{error}");
        world(&options(3, 2, &address)).expect("the last one comes");
        assert!(threads.into_iter().all(|thread| thread.join().expect("no panic").is_ok()));
    });
}

#[test]
fn a_node_that_leaves_fails_or_comes_for_something_else_is_lost_everywhere() {
    let mut worlds = together(3);
    worlds.remove(1);
    eventually_lost(&worlds[0], 1, "node 1: it left its world");
    eventually_lost(&worlds[1], 1, "node 1: it left its world");
    let worlds = together(3);
    worlds[2].lose(2, &Error::other("its disk is full"));
    worlds.iter().for_each(|world| eventually_lost(world, 2, "its disk is full"));
    let error = worlds[1].next_command().unwrap_err().to_string();
    assert!(error.contains("rank 2 is lost"), "{error}");
    let worlds = together(2);
    let errors = on_each(&worlds, |world| {
        world.exchange(if world.node() == 0 { "a" } else { "b" }, Vec::new(), PATIENCE).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|error| error.contains("it came for `b` and node 0 for `a`")), "{errors:?}");
}

#[test]
fn a_node_that_does_not_come_to_a_meeting_is_lost_in_time() {
    let worlds = together(2);
    let error = worlds[0].exchange("a turn", Vec::new(), Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.contains("rank 1 is lost") && error.contains("did not come to `a turn` within 50ms"), "{error}");
    let worlds = together(2);
    let error = worlds[1].exchange("a turn", Vec::new(), Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.contains("rank 0 is lost"), "{error}");
}

#[test]
fn a_node_that_is_silent_is_lost_in_time() {
    let (node, _stranger) = node_and_stranger(Duration::from_millis(300));
    eventually_lost(&node, 1, "node 1: it said nothing for 300ms");
}

#[test]
fn a_node_that_sends_what_it_must_not_is_lost() {
    let (node, mut stranger) = node_and_stranger(PATIENCE);
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    eventually_lost(&node, 1, "no frame of a node");
    let head = |communicator: u32, rank: u32| Writer::default().u32(communicator).u32(rank).text("k", 9);
    let give = |communicator, rank| (0..8).fold(head(communicator, rank), Writer::u32).0;
    let lost = Writer::default().u32(7).u32(0).text("", 9).text("a rank that is none", 99).0;
    let twice = Writer::default().text("a turn", 9).bytes(b"1").0;
    let wrong = [
        (Kind::Give, give(0, 1), "Give of"),    // there is no communicator
        (Kind::Give, give(0, 0), "Give of"),    // the rank is not its own
        (Kind::Give, vec![1, 2, 3], "Give of"), // there is not even a rank
        (Kind::Command, vec![1], "Command of"), // node 0 commands
        (Kind::Met, Vec::new(), "Met of"),      // node 0 says who met
        (Kind::Lost, lost, "Lost of"),          // the rank is none
        (Kind::Meet, vec![255; 4], "Meet of"),  // the text ends beyond the body
        (Kind::Meet, twice, "before the meeting that it is in had ended"),
    ];
    for (kind, body, why) in wrong {
        let (node, mut stranger) = node_and_stranger(PATIENCE);
        send(&mut stranger, kind, &[&body]).unwrap();
        send(&mut stranger, kind, &[&body]).unwrap();
        eventually_lost(&node, 1, why);
    }
}
