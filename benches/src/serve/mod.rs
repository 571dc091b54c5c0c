//! `bcg bench serve`: a server under load, over HTTP.
//!
//! Works against every OpenAI-compatible server. A request's clock starts when it is sent, so it includes the connection
//! where none was idle; what waits for `--max-concurrency` is not sent. Every prompt is made before the clock starts, and an answer is read by
//! its own task, so that this program is not what is measured. A failed request is counted and never ends the run.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use axum::http::{HeaderValue, Uri};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};

mod load;
mod record;
mod sse;
mod workload;

use load::Target;
use record::{Record, summarise};
use workload::{Workload, arrivals};

use super::report::{Environment, Report};
use crate::http_client::HttpClient;
use crate::progress;

/// Which route is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// /v1/completions: random prompts are token ids.
    Completions,
    /// /v1/chat/completions: random prompts are words.
    Chat,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// Flags of `bcg bench serve`.
#[derive(Debug, Clone, Args, Serialize)]
pub struct ServeArgs {
    /// The server, with or without /v1
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:30000")]
    pub base_url: String,

    /// Key to send as a bearer token
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    #[serde(skip)]
    pub api_key: Option<String>,

    /// Model to ask for [default: the first that the server names]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,

    /// Route to ask
    #[arg(long, value_enum, default_value_t = Endpoint::Completions)]
    pub endpoint: Endpoint,

    /// Requests to send
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub num_prompts: usize,

    /// Requests that arrive per second, at random (Poisson); inf sends all at once
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY)]
    pub request_rate: f64,

    /// Requests on their way at once, at most; without a rate, each answer makes room for the next request
    #[arg(long, value_name = "N")]
    pub max_concurrency: Option<usize>,

    /// Tokens (chat: words) of a random prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    pub input_len: usize,

    /// Tokens of an answer at most
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub output_len: usize,

    /// Lengths are drawn evenly from this part of them to the whole
    #[arg(long, value_name = "0.0..1.0", default_value_t = 1.0)]
    pub range_ratio: f64,

    /// Tokens (chat: words) that random prompts of a group begin with, on top of --input-len
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub shared_prefix_len: usize,

    /// Groups of prompts that share a prefix; requests take turns
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_prefixes: usize,

    /// Token ids of random prompts are below this
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub vocab_size: u32,

    /// Take prompts from this file instead, in turn: lines of JSON with a `prompt` or a `question`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input_len", "shared_prefix_len", "num_prefixes"])]
    pub dataset: Option<PathBuf>,

    /// Seed of lengths, prompts and arrivals
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// Ask for answers of full length (the field `ignore_eos`) [default: true for random prompts, false for a dataset]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub ignore_eos: Option<bool>,

    /// Requests before the clock starts
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warmup_requests: usize,

    /// Seconds that a request may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub timeout: f64,

    /// Also write the figures and these flags to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Also write the times of every request to that file
    #[arg(long, requires = "json")]
    pub save_requests: bool,
}

impl ServeArgs {
    fn check(&self) -> Result<()> {
        let counts = [
            ("--num-prompts", self.num_prompts),
            ("--max-concurrency", self.max_concurrency.unwrap_or(1)),
            ("--input-len", self.input_len),
            ("--output-len", self.output_len),
            ("--num-prefixes", self.num_prefixes),
            ("--vocab-size", self.vocab_size as usize),
        ];
        if let Some((flag, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            bail!("{flag}: is 0; give a number of at least 1");
        }
        ensure!(self.request_rate > 0.0, "--request-rate: is {}; give a rate above 0, or inf", self.request_rate);
        ensure!((0.0..=1.0).contains(&self.range_ratio), "--range-ratio: is {}; give 0.0 to 1.0", self.range_ratio);
        let seconds = Duration::try_from_secs_f64(self.timeout).ok().filter(|timeout| !timeout.is_zero());
        seconds.with_context(|| format!("--timeout: is {}; give seconds above 0", self.timeout))?;
        Ok(())
    }

    fn target(&self) -> Result<Target> {
        let base = self.base_url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let named = || format!("--base-url {}", self.base_url);
        let url: Uri = base.parse().with_context(named)?;
        let bearer = |key: &String| HeaderValue::from_str(&format!("Bearer {key}"));
        let authorization = self.api_key.as_ref().map(bearer).transpose().context("--api-key: is no header's value")?;
        let client = HttpClient::new(&url).with_context(named)?;
        Ok(Target { client, base, authorization, timeout: Duration::from_secs_f64(self.timeout) })
    }
}

/// Runs the load and reports it.
///
/// # Errors
/// A flag that cannot work; a server that names no model, or fails the warm-up. A request that failed after that fails
/// the report.
pub fn measure(args: &ServeArgs) -> Result<Report> {
    args.check()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (model, records) = runtime.block_on(load(args))?;
    let mut report = Report::new(Environment::read(&format!("behind {}", args.base_url)));
    report.note(format!("model {model}, {}", description(args)));
    summarise(&records, &mut report);
    report.attach("arguments", json!(args));
    report.attach("model", json!(model));
    if args.save_requests {
        report.attach("requests", records.iter().map(Record::json).collect::<Value>());
    }
    let failed = records.iter().filter(|record| record.error.is_some()).count();
    if failed > 0 {
        report.fail(format!("{failed} of {} requests failed", records.len()));
    }
    Ok(report)
}

async fn load(args: &ServeArgs) -> Result<(String, Vec<Record>)> {
    let target = Arc::new(args.target()?);
    let failed = |what: &str, error| anyhow!("--base-url {}: {what}: {error}", args.base_url);
    let model = match &args.model {
        Some(model) => model.clone(),
        None => target.first_model().await.map_err(|error| failed("asking for the models failed", error))?,
    };
    let mut workload = Workload::new(args, &model)?;
    let times = arrivals(args.num_prompts, args.request_rate, args.seed);
    let requests = times.into_iter().map(|arrival| (arrival, workload.body())).collect();
    // Prompts of their own, so that no prefix cache knows those that are timed.
    let warm_ups = (0..args.warmup_requests).map(|_| (Duration::ZERO, workload.body())).collect();
    let path = args.endpoint.path();
    let bar = progress::bar(args.warmup_requests as u64, "{msg:>8} [{bar:40}] {pos}/{len}", "warm-up");
    let warm = load::run(&target, path, warm_ups, args.max_concurrency, &bar).await;
    bar.finish_and_clear();
    if let Some(error) = warm.into_iter().find_map(|record| record.error) {
        return Err(failed("a request of the warm-up failed", error));
    }
    let bar = progress::bar(args.num_prompts as u64, "{msg:>8} [{bar:40}] {pos}/{len} {per_sec} {eta}", "requests");
    let records = load::run(&target, path, requests, args.max_concurrency, &bar).await;
    bar.finish_and_clear();
    Ok((model, records))
}

/// Says in words what was sent.
fn description(args: &ServeArgs) -> String {
    let rate = match args.request_rate {
        rate if rate.is_finite() => format!("{rate} a second"),
        _ => "all at once".to_owned(),
    };
    let cap = args.max_concurrency.map_or_else(String::new, |most| format!(", at most {most} together"));
    let prompts = match &args.dataset {
        Some(path) => format!("prompts of {}", path.display()),
        None => format!("prompts of {} + {} shared", args.input_len, args.shared_prefix_len),
    };
    let path = args.endpoint.path();
    format!("{} requests to {path}, {rate}{cap}; {prompts}, answers of {}", args.num_prompts, args.output_len)
}

#[cfg(test)]
pub(super) mod tests {
    use std::convert::Infallible;
    use std::fs;
    use std::sync::mpsc;

    use axum::Router;
    use axum::body::{Body, Bytes};
    use axum::http::HeaderMap;
    use axum::response::{IntoResponse, Response};
    use axum::routing::{get, post};
    use clap::Parser;
    use futures_util::stream;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: ServeArgs,
    }

    /// Parses the flags of `bcg bench serve`.
    pub(in super::super) fn parse(flags: &[&str]) -> ServeArgs {
        Line::try_parse_from(["serve"].iter().chain(flags)).expect("flags parse").args
    }

    /// A server that needs a key, streams as many tokens as it is asked for in frames of 7 bytes, and refuses prompts
    /// that begin with 3.
    fn fake_server() -> String {
        async fn answer(headers: HeaderMap, body: Bytes) -> Response {
            let body: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(headers["authorization"], "Bearer secret");
            assert_eq!((&body["model"], &body["stream_options"]["include_usage"]), (&json!("fake"), &json!(true)));
            if body["prompt"][0] == 3 {
                return (axum::http::StatusCode::TOO_MANY_REQUESTS, r#"{"error": {"message": "full"}}"#)
                    .into_response();
            }
            let tokens = body["max_tokens"].as_u64().expect("a count") as usize;
            let chunk = json!({"choices": [{"text": "a", "finish_reason": null}]});
            let usage = json!({"prompt_tokens": 5, "completion_tokens": tokens});
            let last = json!({"choices": [], "usage": usage});
            let text = format!("{}data: {last}\n\ndata: [DONE]\n\n", format!("data: {chunk}\n\n").repeat(tokens));
            let frames: Vec<_> =
                text.into_bytes().chunks(7).map(Bytes::copy_from_slice).map(Ok::<_, Infallible>).collect();
            Body::from_stream(stream::iter(frames)).into_response()
        }
        let (sender, address) = mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                sender.send(listener.local_addr().expect("an address")).expect("the test waits");
                let models = get(|| async { r#"{"data": [{"id": "fake"}]}"# });
                let router = Router::new().route("/v1/models", models).route("/v1/completions", post(answer));
                axum::serve(listener, router).await.expect("serves");
            });
        });
        format!("http://{}/v1", address.recv().expect("the server starts"))
    }

    #[test]
    fn a_run_counts_times_and_errors_of_a_streaming_server() {
        let url = fake_server();
        let json_path = std::env::temp_dir().join(format!("bcg-serve-{}.json", std::process::id()));
        let json_flags = ["--json", json_path.to_str().expect("UTF-8"), "--save-requests"];
        let flags = ["--base-url", &url, "--api-key", "secret", "--num-prompts", "40", "--input-len", "2"];
        let more = ["--output-len", "6", "--vocab-size", "4", "--max-concurrency", "8", "--warmup-requests", "0"];
        let args = parse(&[&flags[..], &more, &json_flags].concat());
        let report = measure(&args).expect("runs");
        let error = report.publish(args.json.as_deref()).expect_err("some prompts begin with 3").to_string();
        let written: Value = serde_json::from_str(&fs::read_to_string(&json_path).expect("written")).expect("JSON");
        fs::remove_file(&json_path).expect("it is there");
        let throughput = &written["rows"][0];
        let failed = throughput["errors"].as_u64().expect("a count");
        assert!((1..40).contains(&failed), "{written:#}");
        assert_eq!(error, format!("{failed} of 40 requests failed"));
        assert_eq!(
            (&throughput["output_tokens"], &throughput["chunks"]),
            (&json!(6 * (40 - failed)), &json!(6 * (40 - failed)))
        );
        assert_eq!(throughput["input_tokens"], 5 * (40 - failed));
        assert!(throughput["peak_concurrency"].as_u64().is_some_and(|peak| (2..=8).contains(&peak)), "{throughput}");
        let errors = written["rows"].as_array().expect("rows").last().expect("a row");
        assert_eq!((&errors["error"], &errors["requests"]), (&json!("HTTP 429: full"), &json!(failed)));
        assert_eq!(written["requests"].as_array().map(Vec::len), Some(40));
        assert_eq!((&written["arguments"]["num_prompts"], &written["model"]), (&json!(40), &json!("fake")));
        assert!(!written.to_string().contains("secret"), "the key stays out of the file");
    }

    #[test]
    fn many_streams_run_at_once() {
        let flags = ["--base-url", &fake_server(), "--api-key", "secret", "--num-prompts", "512", "--input-len", "8"];
        let args = parse(&[&flags[..], &["--output-len", "20", "--vocab-size", "3"]].concat());
        let throughput = &measure(&args).expect("runs").json()["rows"][0];
        assert_eq!((&throughput["errors"], &throughput["chunks"]), (&json!(0), &json!(512 * 20)));
        assert!(throughput["peak_concurrency"].as_u64().is_some_and(|peak| peak > 256), "{throughput}");
    }

    #[test]
    fn a_server_that_is_not_there_is_named() {
        let error = measure(&parse(&["--base-url", "http://127.0.0.1:9"])).expect_err("nothing listens").to_string();
        assert!(error.starts_with("--base-url http://127.0.0.1:9: asking for the models failed: "), "{error}");
    }

    #[test]
    fn flags_that_cannot_work_are_refused_by_name() {
        for (flag, value) in [
            ("--num-prompts", "0"),
            ("--request-rate", "0"),
            ("--request-rate", "NaN"),
            ("--range-ratio", "1.5"),
            ("--timeout", "0"),
            ("--vocab-size", "0"),
            ("--base-url", "ftp://host"),
        ] {
            let error = measure(&parse(&[flag, value])).expect_err("cannot work").to_string();
            assert!(error.starts_with(flag), "{error}");
        }
    }
}
