//! A checkpoint whose ranks live on several nodes: the tokens of one process. Nodes are threads here, each with a runner of its
//! own; what they share goes over the loopback network.

use std::net::TcpListener;

use bcg_models::{GraphMode, ModelRunner, SamplingParams};
use bcg_runtime::{Device, SpanOptions};

use super::checkpoint::{answer, reference, tokens_of};
use super::{Checkpoint, folder, load_ranks, options};

/// In each of these modes greedy and drawn tokens are those of the same ranks in one process, on host devices.
pub fn nodes_choose_the_tokens_of_one_process(
    checkpoint: Checkpoint,
    num_nodes: usize,
    num_local: usize,
    modes: &[GraphMode],
) {
    let prompts: Vec<Vec<u32>> = reference(checkpoint).iter().take(2).map(tokens_of).collect();
    let drawn = SamplingParams { temperature: 3.0, top_k: Some(200), top_p: 0.99, min_p: 0.0, seed: 11 };
    let answers = |runner: &mut ModelRunner| -> Vec<Vec<u32>> {
        [SamplingParams::greedy(), drawn]
            .iter()
            .zip(&prompts)
            .map(|(how, prompt)| answer(runner, prompt, *how))
            .collect()
    };
    let hosts = |count| (0..count).map(|_| Device::host()).collect::<Vec<_>>();
    let expected = answers(&mut load_ranks(&hosts(num_nodes * num_local), checkpoint, options(GraphMode::Off)));
    for &mode in modes {
        let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
        let load = |node| {
            let span = SpanOptions::new(num_nodes, node, address.to_string());
            let (folder, devices) = (folder(checkpoint), hosts(num_local));
            let mut runner = ModelRunner::load_nodes(&devices, Some(span), &folder, options(mode), &mut |_| ())
                .expect("the tiny checkpoint loads on every node");
            runner.capture(&mut |_| ()).expect("every size is captured");
            runner
        };
        std::thread::scope(|scope| {
            let load = &load;
            let follow = |node| scope.spawn(move || load(node).follow());
            let others: Vec<_> = (1..num_nodes).map(follow).collect();
            let mut runner = load(0);
            assert_eq!((runner.num_ranks(), runner.world().num_nodes()), (num_nodes * num_local, num_nodes));
            assert_eq!(answers(&mut runner), expected, "{mode:?}");
            let stats = runner.stats();
            assert_eq!(stats.num_replays > 0, mode != GraphMode::Off, "{stats:?}");
            drop(runner);
            for other in others {
                other.join().expect("no panic").expect("node 0 has left in order");
            }
        });
    }
}
