//! Two replicas behind one front door answer as one engine does, and one that is lost takes only its own requests.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bcg_cli::args::ServerArgs;
use bcg_engine::local::LocalEngine;
use bcg_engine::metrics::ReasonLabel;
use bcg_engine::{
    ChatMessage, Engine, EngineEnd, EngineEvent, EventStream, GenerationRequest, Health, Prompt, Replicas, SubmitError,
    replicas,
};
use bcg_models::ModelRunner;
use bcg_runtime::HostControl;
use clap::Parser;
use serde_json::{Value, json};

use crate::client::{Server, options};
use crate::eventually;

/// Within which the loss of a replica must be known.
const REPORTED_WITHIN: Duration = Duration::from_secs(2);

/// Tokens of a long answer: it still runs when a test has seen that it does.
const LONG: usize = 60;

/// Engines, how often each loaded its model, and the controls of the devices of their last ranks.
struct Rig {
    engine: Arc<Replicas<LocalEngine>>,
    loads: Arc<[AtomicUsize; 2]>,
    controls: Arc<Mutex<[Option<HostControl>; 2]>>,
}

fn start(flags: &[&str]) -> Rig {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let line = ["bcg-server", "--model", model, "--device", "host", "--context-length", "640"];
    let args = ServerArgs::try_parse_from(line.iter().chain(flags)).expect("flags parse");
    let (loads, controls) = (Arc::<[AtomicUsize; 2]>::default(), Arc::<Mutex<[Option<HostControl>; 2]>>::default());
    let (counted, controlled) = (Arc::clone(&loads), Arc::clone(&controls));
    let model = move |replica: usize, runner: ModelRunner| {
        counted[replica].fetch_add(1, Ordering::SeqCst);
        let last_rank = runner.world().device(runner.num_ranks() - 1);
        controlled.lock().expect("no panic")[replica] = last_rank.host_control().cloned();
        Ok(runner)
    };
    let engine = replicas::start_with(&args.engine.options(), |_| (), model);
    Rig { engine: Arc::new(engine.expect("starts")), loads, controls }
}

impl Rig {
    fn inject(&self, replica: usize, fault: &str) {
        let controls = self.controls.lock().expect("no panic");
        controls[replica].as_ref().expect("a host device").inject(fault).expect("a fault");
    }

    fn loads(&self) -> [usize; 2] {
        [0, 1].map(|replica| self.loads[replica].load(Ordering::SeqCst))
    }

    /// Requests of each replica that ended so.
    fn ended(&self, reason: &'static str) -> Vec<u64> {
        let count = |engine: &LocalEngine| engine.metrics().finished.get_or_create(&ReasonLabel { reason }).get();
        self.engine.engines().iter().map(count).collect()
    }

    /// Answers that run, on each replica.
    fn running(&self) -> Vec<i64> {
        self.engine.engines().iter().map(|engine| engine.metrics().running.get()).collect()
    }

    /// Asks for long answers, as many on each replica.
    fn long_answers(&self, num: u32) -> Vec<EventStream> {
        let ask = |at| {
            let prompt = Prompt::Tokens((0..20).map(|token| 8 + 7 * token + at).collect());
            let request =
                GenerationRequest { max_tokens: Some(LONG), ignore_eos: true, ..GenerationRequest::greedy(prompt) };
            loop {
                match self.engine.submit(request.clone()) {
                    Err(SubmitError::QueueFull { .. }) => std::thread::yield_now(),
                    submitted => return submitted.expect("accepted"),
                }
            }
        };
        let streams = (0..num).map(ask).collect();
        let half = i64::from(num / 2);
        eventually("half of them run on each", || self.running() == [half, half]);
        streams
    }
}

fn outcome(mut stream: EventStream) -> Result<Vec<u32>, String> {
    let (mut tokens, mut end) = (Vec::new(), None);
    while let Some(event) = stream.next_blocking() {
        assert!(end.is_none(), "nothing comes after the end");
        match event {
            EngineEvent::Delta(delta) => tokens.extend(delta.tokens),
            EngineEvent::Finished { .. } => end = Some(Ok(())),
            EngineEvent::Failed(error) => end = Some(Err(error.to_string())),
        }
    }
    end.expect("an end").map(|()| tokens)
}

/// Questions in the chat template, and the same with five examples before them, which all of those share.
fn questions(num: usize) -> (Vec<Prompt>, Vec<Prompt>) {
    let data = |file| {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data").join(file);
        std::fs::read_to_string(path).expect("the data is there")
    };
    let text = |value: &Value, field: &str| value[field].as_str().expect("text").to_owned();
    let shots: Vec<Value> = serde_json::from_str(&data("mini_gsm_shots.json")).expect("JSON");
    let shots =
        shots.iter().map(|shot| format!("Question: {}\nAnswer: {}\n\n", text(shot, "question"), text(shot, "answer")));
    let shots: String = shots.collect();
    let problems = data("mini_gsm_test.jsonl");
    let problems = problems.lines().take(num).map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let problems: Vec<String> = problems.map(|problem| text(&problem, "question")).collect();
    let chat = |problem: &String| Prompt::chat(vec![ChatMessage::new("user", problem.as_str())]);
    let few = |problem: &String| Prompt::Text(format!("{shots}Question: {problem}\nAnswer: "));
    (problems.iter().map(chat).collect(), problems.iter().map(few).collect())
}

fn submit(engine: &Replicas<LocalEngine>, prompt: &Prompt) -> EventStream {
    let request = GenerationRequest::greedy(prompt.clone());
    let request = GenerationRequest { max_tokens: Some(40), stop: vec!["\n".to_owned()], ..request };
    engine.submit(request).expect("accepted")
}

#[test]
fn two_replicas_give_the_tokens_of_one_engine_and_are_counted_apart() {
    let (chats, few_shots) = questions(16);
    let all_at_once = |rig: &Rig| -> Vec<Vec<u32>> {
        let streams: Vec<_> = chats.iter().map(|prompt| submit(&rig.engine, prompt)).collect();
        streams.into_iter().map(|stream| outcome(stream).expect("an answer")).collect()
    };
    let expected = all_at_once(&start(&[]));
    assert!(expected.iter().all(|tokens| tokens.len() > 5));
    let rig = start(&["--dp", "2", "--enable-breakable-cuda-graph", "--capture", "lazy"]);
    assert_eq!(all_at_once(&rig), expected);
    let had: Vec<u64> = rig.ended("stop").iter().zip(rig.ended("length")).map(|(stop, length)| stop + length).collect();
    assert!(had.iter().all(|&had| had >= 5), "both had some: {had:?}");
    // One at a time: what they share is computed once, and found again.
    let cached = || rig.engine.engines().iter().map(|engine| engine.metrics().cached_prompt_tokens.get());
    let before: Vec<u64> = cached().collect();
    few_shots[..5].iter().for_each(|prompt| drop(outcome(submit(&rig.engine, prompt)).expect("an answer")));
    let gained: Vec<u64> = cached().zip(before).map(|(after, before)| after - before).collect();
    assert!(gained.contains(&0) && gained.iter().any(|&gained| gained > 4 * 192), "all went to one: {gained:?}");

    let server = Server::start(rig.engine.clone(), options());
    let info = server.get("/server_info").json();
    assert_eq!((&info["dp_size"], &info["settings"]["dp"]), (&json!(2), &json!(2)), "{info}");
    for (index, name) in ["host:0", "host:1"].iter().enumerate() {
        let replica = &info["replicas"][index];
        assert_eq!((&replica["status"], &replica["devices"]), (&json!("ready"), &json!([name])), "{info}");
        assert_eq!((&replica["answers"], &replica["load_tokens"]), (&json!(0), &json!(0)), "{info}");
    }
    let metrics = server.get("/metrics").body;
    for line in [
        "\nbcg_queue_depth 0\n",
        "\nbcg_running_requests{replica=\"0\"} 0\nbcg_running_requests{replica=\"1\"} 0\n",
        "\nbcg_rank_memory_bytes{replica=\"1\",rank=\"0\"} ",
        "\nbcg_step_time_seconds_count{replica=\"1\",phase=\"decode\"} ",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    let types: Vec<&str> = metrics.lines().filter(|line| line.starts_with("# TYPE")).collect();
    assert!(types.iter().all(|line| metrics.matches(&format!("{line}\n")).count() == 1), "{metrics}");
    assert!(!metrics.contains("# EOF"), "Prometheus's text has no such mark");
    assert_eq!(server.get("/health_generate").json(), json!({"status": "ready"}));
}

#[test]
fn a_replica_whose_model_is_lost_takes_only_its_own_requests_and_comes_back() {
    let rig = start(&["--dp", "2"]);
    let streams = rig.long_answers(8);
    rig.inject(1, "fail:cuLaunchKernel:3");
    let outcomes: Vec<_> = streams.into_iter().map(outcome).collect();
    let failed: Vec<&String> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    assert_eq!(failed.len(), 4, "those of the replica: {failed:?}");
    assert!(outcomes.iter().flatten().all(|tokens| tokens.len() == LONG), "the others are whole");
    eventually("it is loaded again", || rig.engine.health() == Health::Ready);
    assert_eq!(rig.loads(), [1, 2]);
    eventually("each is counted", || (rig.ended("failed"), rig.ended("length")) == (vec![0, 4], vec![4, 0]));
    rig.long_answers(4).into_iter().for_each(|stream| drop(outcome(stream).expect("both serve again")));
}

#[test]
fn a_rank_of_one_replica_that_is_lost_ends_the_world_of_that_replica_only() {
    let rig = start(&["--dp", "2", "--tp", "2"]);
    let streams = rig.long_answers(4);
    rig.inject(1, "panic:cuLaunchKernel:3");
    let (whole, failed): (Vec<_>, Vec<_>) = streams.into_iter().map(outcome).partition(Result::is_ok);
    assert_eq!((whole.len(), failed.len()), (2, 2), "{failed:?}");
    assert!(
        failed.iter().flat_map(|failed| failed.as_ref().err()).all(|why| why.contains("rank 1 is lost")),
        "{failed:?}"
    );
    eventually("it is loaded again", || rig.engine.health() == Health::Ready);
    assert_eq!(rig.loads(), [1, 2]);
    let server = Server::start(rig.engine.clone(), options());
    let info = server.get("/server_info").json();
    assert_eq!(info["replicas"][1]["devices"], json!(["host:2", "host:3"]), "{info}");
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("bcg_lost_ranks_total{replica=\"1\",rank=\"1\"} 1\n"), "{metrics}");
}

#[test]
fn a_replica_that_ends_for_good_leaves_the_others_serving_until_the_last_one_ends() {
    let rig = start(&["--dp", "2"]);
    let server = Server::start(rig.engine.clone(), options());
    let streams = rig.long_answers(8);
    rig.inject(1, "lost:cuLaunchKernel:3");
    let began = Instant::now();
    eventually("it is known", || matches!(rig.engine.health(), Health::Degraded(_)));
    assert!(began.elapsed() < REPORTED_WITHIN, "{:?}", began.elapsed());
    let failed = streams.into_iter().map(outcome).filter(Result::is_err).count();
    assert_eq!((failed, rig.loads()), (4, [1, 1]));
    eventually("the others are whole", || rig.ended("length") == [4, 0]);
    for path in ["/health", "/health_generate"] {
        let health = server.get(path);
        let (body, reason) = (health.json(), "replica 1: the device's context is lost");
        assert_eq!((health.status, &body["status"]), (200, &json!("degraded")), "{path}: {body}");
        assert!(body["reason"].as_str().is_some_and(|said| said.starts_with(reason)), "{path}: {body}");
    }
    assert_eq!(server.get("/server_info").json()["replicas"][1]["status"], "failed");
    let ask = || server.post("/v1/completions", &json!({"prompt": [9, 9, 9], "max_tokens": 3, "ignore_eos": true}));
    (0..6).for_each(|at| assert_eq!(ask().status, 200, "request {at}"));
    // With the token that /health_generate asked for.
    eventually("all are of one replica", || rig.ended("length") == [4 + 1 + 6, 0]);

    rig.inject(0, "lost:cuLaunchKernel:1");
    assert_eq!(ask().status, 500, "its own request");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let EngineEnd::GaveUp(why) = runtime.block_on(rig.engine.given_up()) else { panic!("no thread is stuck") };
    assert!(why.contains("replica 0: the device's context is lost") && why.contains("; replica 1: "), "{why}");
    let health = server.get("/health");
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("failed")));
    assert_eq!(server.get("/health_generate").status, 503);
    assert_eq!(ask().status, 500, "nobody is left");
}

#[test]
fn a_replica_that_hangs_keeps_nobody_waiting_and_no_place_in_the_queue() {
    let rig =
        start(&["--dp", "2", "--watchdog-timeout", "1", "--max-running-requests", "2", "--max-queued-requests", "4"]);
    // A step of a size that is known may not take longer than the watchdog's time.
    rig.long_answers(4).into_iter().for_each(|stream| drop(outcome(stream).expect("an answer")));
    let streams = rig.long_answers(4);
    rig.inject(1, "hang:cuLaunchKernel:40");
    let waiting: Vec<_> = (0..3).map(|_| submit(&rig.engine, &Prompt::Text("1+1".into()))).collect();
    let outcomes: Vec<_> = streams.into_iter().chain(waiting).map(outcome).collect();
    let stuck = |outcome: &&Result<_, String>| outcome.as_ref().is_err_and(|why| why.contains("the engine is stuck"));
    let num_failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
    assert!(num_failed >= 2 && num_failed == outcomes.iter().filter(stuck).count(), "{outcomes:?}");
    assert!(outcomes.iter().filter(|outcome| outcome.is_ok()).count() >= 2, "the others are whole");
    assert!(matches!(rig.engine.health(), Health::Degraded(why) if why.starts_with("replica 1: the engine is stuck")));
    rig.engine.engines().iter().for_each(|engine| assert_eq!(engine.metrics().queue_depth.get(), 0));
    (0..4).for_each(|_| drop(outcome(submit(&rig.engine, &Prompt::Text("1+1".into()))).expect("an answer")));
    rig.controls.lock().expect("no panic")[1].as_ref().expect("a host device").clear_faults();
}

#[test]
fn a_drain_finishes_what_both_replicas_run_and_takes_nothing_new() {
    let rig = start(&["--dp", "2"]);
    let streams = rig.long_answers(8);
    rig.engine.drain();
    assert_eq!(rig.engine.health(), Health::Draining);
    let refused = rig.engine.submit(GenerationRequest::greedy(Prompt::Tokens(vec![9])));
    assert_eq!(refused.expect_err("it ends"), SubmitError::ShuttingDown);
    assert!(streams.into_iter().all(|stream| outcome(stream).is_ok_and(|tokens| tokens.len() == LONG)));
}

#[test]
fn the_queue_is_that_of_the_whole_server() {
    let flags = ["--dp", "2", "--max-running-requests", "2", "--max-queued-requests", "3"];
    let rig = start(&flags);
    let running = rig.long_answers(4);
    let short = GenerationRequest { max_tokens: Some(2), ..GenerationRequest::greedy(Prompt::Tokens(vec![9])) };
    let more = || rig.engine.submit(short.clone());
    let waiting: Vec<_> = (0..3).map(|_| more().expect("there is room for three")).collect();
    assert_eq!(more().expect_err("not for six"), SubmitError::QueueFull { max_queued_requests: 3 });
    assert_eq!(rig.engine.engines()[1].metrics().queue_depth.get(), 3);
    drop(running);
    waiting.into_iter().for_each(|stream| drop(outcome(stream).expect("its turn came")));
}

#[test]
fn an_error_at_the_load_names_the_replica() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let args = ServerArgs::try_parse_from(["bcg-server", "--model", model, "--device", "host", "--dp", "2"]);
    let options = args.expect("flags parse").engine.options();
    let refuse_second = |replica: usize, runner: ModelRunner| match replica {
        1 => Err(anyhow::anyhow!("no luck")),
        _ => Ok(runner),
    };
    let error = replicas::start_with(&options, |_| (), refuse_second).expect_err("the second one does not load");
    assert_eq!(format!("{error:#}"), "replica 1: no luck");
    let alone = bcg_engine::load::start(&options, |_| ()).expect_err("one engine is no two");
    assert!(alone.to_string().contains("`dp`"), "{alone}");
}
