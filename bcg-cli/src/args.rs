//! Command line flags, shared by the binaries, and what they become: the options of the engine and of the HTTP layer.
//!
//! Flags carry SGLang's names where SGLang has one. A flag is its option with dashes: `--context-length` sets
//! `context_length`. Messages of the layers below name options in backticks; [`in_flags`] names the flags instead.

mod http;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use bcg_engine::roles::RoleDevice;
use bcg_engine::{CaptureMode, DeviceChoice, EngineOptions};
use bcg_models::LoadFormat;
use bcg_models::weights::MoeA2a;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, CommandFactory, Parser, ValueEnum};

pub use http::HttpArgs;

/// Names of values of a flag, what `--help` says about them, and what they stand for.
type Choices<T> = [(&'static str, &'static str, T)];

const DEVICES: &Choices<DeviceChoice> = &[
    ("auto", "CUDA if there is a usable GPU, else the host device", DeviceChoice::Auto),
    ("host", "The emulated device; needs no GPU", DeviceChoice::Host),
    ("cuda", "CUDA GPUs, the first ones if --devices names none; an error if there are too few", DeviceChoice::Cuda),
];

const CAPTURES: &Choices<CaptureMode> = &[
    ("ahead", "Every size of the ladder before the first request is served", CaptureMode::Ahead),
    ("lazy", "The exact size of each step, when it first runs", CaptureMode::Lazy),
];

const MOE_A2A_BACKENDS: &Choices<MoeA2a> = &[
    ("none", "Not at all: every rank has all rows, and computes what its experts make of them", MoeA2a::None),
    ("push", "Each is pushed to the ranks that own its experts, within the captured forward", MoeA2a::Push),
    ("break", "In messages of one size for all ranks, in an eager break", MoeA2a::Break),
];

const LOAD_FORMATS: &Choices<LoadFormat> = &[
    ("auto", "The checkpoint's safetensors files", LoadFormat::Auto),
    ("dummy", "Random numbers made on the device; needs config.json only", LoadFormat::Dummy),
];

/// Reads one of the named values.
fn one_of<T: Copy + Send + Sync>(choices: &'static Choices<T>) -> impl TypedValueParser<Value = T> {
    let names = choices.iter().map(|(name, help, _)| PossibleValue::new(*name).help(*help));
    PossibleValuesParser::new(names).try_map(|given| {
        let known = choices.iter().find(|(name, _, _)| *name == given);
        known.map(|(_, _, value)| *value).ok_or("is not one of them")
    })
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One readable line per event.
    Text,
    /// One JSON object per event.
    Json,
}

/// Where to run, for commands that need no model.
#[derive(Debug, Clone, Copy, Args)]
pub struct DeviceArgs {
    /// Where to run: auto picks CUDA if there is a usable GPU, else the host device
    #[arg(long, value_parser = one_of(DEVICES), default_value = "auto")]
    pub device: DeviceChoice,
}

/// Flags of everything that runs a model: the server, `bcg generate`, `bcg eval`, `bcg inspect`.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// Folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json)
    #[arg(long, alias = "model-path", value_name = "DIR")]
    pub model: PathBuf,

    /// Where the weights come from: dummy makes random ones on the device and needs config.json only
    #[arg(long, value_parser = one_of(LOAD_FORMATS), default_value = "auto")]
    pub load_format: LoadFormat,

    /// Run without tokenizer.json: prompts are token ids, and answers too
    #[arg(long)]
    pub skip_tokenizer_init: bool,

    /// Take what clients send, in messages and in prompts of text, for the control tokens that it spells, such as
    /// <|im_start|>; else it stays text
    #[arg(long)]
    pub allow_special_tokens_in_content: bool,

    /// Where to run.
    #[command(flatten)]
    pub device: DeviceArgs,

    /// Tensor parallelism: ranks that the model is divided among, each on a device [default: N of --ep N, or 1]
    #[arg(long, aliases = ["tensor-parallel-size", "tp-size"], value_name = "N")]
    pub tp: Option<usize>,

    /// Expert parallelism: each of N ranks has a share of the experts, in place of a share of every expert
    #[arg(long, aliases = ["expert-parallel-size", "ep-size"], value_name = "N", default_value_t = 1)]
    pub ep: usize,

    /// With --ep: how rows come to the experts of other ranks
    #[arg(long, value_parser = one_of(MOE_A2A_BACKENDS), default_value = "none")]
    pub moe_a2a_backend: MoeA2a,

    /// Pipeline parallelism: stages that the layers are divided among, each with the devices of --tp
    #[arg(long, aliases = ["pipeline-parallel-size", "pp-size"], value_name = "N", default_value_t = 1)]
    pub pp: usize,

    /// Data parallelism: replicas of the model, each on devices of its own, that share the requests
    #[arg(long, aliases = ["data-parallel-size", "dp-size"], value_name = "N", default_value_t = 1)]
    pub dp: usize,

    /// Numbers of the GPUs of the ranks, replica after replica and in each stage after stage, separated by commas; one that
    /// stands there several times has several ranks [default: 0, 1, 2, …: as many as --dp times --pp times --tp]
    #[arg(long, value_name = "GPU,GPU,…", value_delimiter = ',')]
    pub devices: Option<Vec<usize>>,

    /// Processes, or nodes, that the ranks of --tp live in, as many in each; --devices names the GPUs of this one
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub nnodes: usize,

    /// This process among the nodes: node 0 serves, the others follow it
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub node_rank: usize,

    /// Where node 0 listens until all nodes are there, on a network that is trusted
    #[arg(long, value_name = "HOST:PORT")]
    pub dist_init_addr: Option<String>,

    /// Prefill apart from decode, each on a GPU: prefill:0,decode:1. Requests go from the first one to the second one with
    /// their first token, and their keys and values ahead of them
    #[arg(long, value_name = "ROLE:GPU", value_delimiter = ',', num_args = 1..=2)]
    pub disaggregation: Vec<RoleDevice>,

    /// Replay prefills as breakable CUDA graphs, and decodes as full ones
    #[arg(long)]
    pub enable_breakable_cuda_graph: bool,

    /// Largest token count of a prefill that gets a graph; larger steps run eagerly [default: --chunked-prefill-size]
    #[arg(long, value_name = "TOKENS")]
    pub cuda_graph_max_tokens: Option<usize>,

    /// Token counts of prefills to capture, separated by commas, instead of the default ladder
    #[arg(long, value_name = "T,T,…", value_delimiter = ',', num_args = 0..)]
    pub cuda_graph_sizes: Option<Vec<usize>>,

    /// Batch sizes of decodes to capture, separated by commas, instead of the default ladder
    #[arg(long, value_name = "B,B,…", value_delimiter = ',', num_args = 0..)]
    pub cuda_graph_decode_sizes: Option<Vec<usize>>,

    /// When graphs are captured
    #[arg(long, value_parser = one_of(CAPTURES), default_value = "ahead")]
    pub capture: CaptureMode,

    /// With --capture lazy: graphs held at most, of prefills and again of decodes; the least recently used goes first
    /// [default: 128]
    #[arg(long, value_name = "N")]
    pub cuda_graph_lazy_max_graphs: Option<usize>,

    /// With --capture lazy: GPU memory that graphs take at most, of prefills and again of decodes, in MiB; the least
    /// recently used goes first [default: 256]
    #[arg(long, value_name = "MIB")]
    pub cuda_graph_lazy_max_mib: Option<usize>,

    /// Run eagerly what would replay a graph, as padded as that graph, to tell a graph problem from a model problem
    #[arg(long)]
    pub debug_cuda_graph: bool,

    /// Compare every Nth replay with an eager run of the same step
    #[arg(long, value_name = "N")]
    pub verify_graph: Option<u32>,

    /// Fill freed graph memory with a pattern that shows up when it is read
    #[arg(long)]
    pub poison_graph_memory: bool,

    /// Sequences that decode together at most
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().max_running_requests)]
    pub max_running_requests: usize,

    /// Requests that may wait, whatever the number of their answers; one more is refused (HTTP 429). One client may have
    /// four times as many waiting as there are places left
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().max_queued_requests)]
    pub max_queued_requests: usize,

    /// Answers that may wait, over all requests; a request for more is refused (HTTP 429). One client may have four times
    /// as many waiting as there are places left
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().max_queued_choices)]
    pub max_queued_choices: usize,

    /// Seconds that a request may wait before it begins to run; it fails then (HTTP 503). 0 lets it wait for ever
    #[arg(long, value_name = "SECONDS", default_value_t = EngineOptions::default().queue_timeout.as_secs())]
    pub queue_timeout: u64,

    /// Seconds that a step may take before the engine counts as stuck and the process ends; ten
    /// times as long for a step that may capture graphs or is the first of its size. 0 does not watch
    #[arg(long, value_name = "SECONDS", default_value_t = EngineOptions::default().watchdog_timeout.as_secs())]
    pub watchdog_timeout: u64,

    /// Tokens of prompt and answer together at most [default: the model's]
    #[arg(long, value_name = "TOKENS")]
    pub context_length: Option<usize>,

    /// Tokens that the KV cache holds over all sequences [default: sized from the model and the batch]
    #[arg(long, alias = "max-total-tokens", value_name = "TOKENS")]
    pub kv_cache_tokens: Option<usize>,

    /// Part of the GPU's memory, 0.0 to 1.0, for weights, activations, graphs and KV cache together: the cache gets what
    /// the others leave of it; --kv-cache-tokens wins [default: 0.9]
    #[arg(long, value_name = "FRACTION")]
    pub mem_fraction_static: Option<f64>,

    /// Tokens in one page of the KV cache
    #[arg(long, value_name = "TOKENS", default_value_t = EngineOptions::default().page_size)]
    pub page_size: usize,

    /// Tokens in one step at most, the newest ones of answers first; a longer prompt is prefilled in chunks
    #[arg(long, value_name = "TOKENS", default_value_t = EngineOptions::default().chunked_prefill_size)]
    pub chunked_prefill_size: usize,

    /// Compute every prompt from its first token, even if another one began alike
    #[arg(long)]
    pub disable_radix_cache: bool,
}

/// Flags of `bcg-server`.
#[derive(Debug, Clone, Parser)]
#[command(name = "bcg-server", version, about = "OpenAI-compatible server on breakable CUDA graphs")]
pub struct ServerArgs {
    /// Flags of the engine.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,

    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 30000)]
    pub port: u16,

    /// Address to listen on for operators, with --admin-port
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub admin_host: String,

    /// Port for operators only, never for clients: /health, /health_generate, /metrics, /flush_cache and /server_info over
    /// plain HTTP, without a key and whatever the public port suffers; 0 takes a free one
    #[arg(long, value_name = "PORT")]
    pub admin_port: Option<u16>,

    /// Name of the model in the API [default: the checkpoint folder's name]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,

    /// How log lines are written
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// Serve from a worker process that is started again when it is lost; meanwhile requests get a 503
    #[arg(long)]
    pub supervise: bool,

    /// With --supervise: workers that may be lost within ten minutes before the server gives up
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub max_restarts: usize,

    /// Whether the process ends, with an error, when the watchdog finds a call that does not return; if not, it stays to be
    /// looked at, with /health at 503, and serves no more
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub watchdog_exit: bool,

    /// Flags of the HTTP layer.
    #[command(flatten)]
    pub http: HttpArgs,
}

impl EngineArgs {
    /// Returns the options that the flags stand for.
    pub fn options(&self) -> EngineOptions {
        let mut options = EngineOptions::new(&self.model);
        options.load_format = self.load_format;
        options.skip_tokenizer_init = self.skip_tokenizer_init;
        options.allow_special_tokens_in_content = self.allow_special_tokens_in_content;
        options.device = self.device.device;
        (options.tp, options.ep) = (self.tp.unwrap_or(self.ep.max(1)), self.ep);
        options.moe_a2a_backend = self.moe_a2a_backend;
        (options.pp, options.dp) = (self.pp, self.dp);
        options.devices = self.devices.clone();
        options.disaggregation = self.disaggregation.clone();
        (options.nnodes, options.node_rank) = (self.nnodes, self.node_rank);
        options.dist_init_addr = self.dist_init_addr.clone();
        options.enable_breakable_cuda_graph = self.enable_breakable_cuda_graph;
        options.cuda_graph_max_tokens = self.cuda_graph_max_tokens;
        options.cuda_graph_sizes = self.cuda_graph_sizes.clone();
        options.cuda_graph_decode_sizes = self.cuda_graph_decode_sizes.clone();
        options.capture = self.capture;
        options.cuda_graph_lazy_max_graphs = self.cuda_graph_lazy_max_graphs;
        options.cuda_graph_lazy_max_mib = self.cuda_graph_lazy_max_mib;
        options.debug_cuda_graph = self.debug_cuda_graph;
        options.verify_graph = self.verify_graph;
        options.poison_graph_memory = self.poison_graph_memory;
        options.max_running_requests = self.max_running_requests;
        options.max_queued_requests = self.max_queued_requests;
        options.max_queued_choices = self.max_queued_choices;
        options.queue_timeout = Duration::from_secs(self.queue_timeout);
        options.watchdog_timeout = Duration::from_secs(self.watchdog_timeout);
        options.context_length = self.context_length;
        options.kv_cache_tokens = self.kv_cache_tokens;
        options.mem_fraction_static = self.mem_fraction_static;
        options.page_size = self.page_size;
        options.chunked_prefill_size = self.chunked_prefill_size;
        options.disable_radix_cache = self.disable_radix_cache;
        options
    }

    /// Returns the options for a command that reads and writes text.
    ///
    /// # Errors
    /// If `--skip-tokenizer-init` was given.
    pub fn text_options(&self, command: &str) -> anyhow::Result<EngineOptions> {
        ensure!(!self.skip_tokenizer_init, "--skip-tokenizer-init: {command} reads and writes text; drop the flag");
        Ok(self.options())
    }
}

/// Writes an error message with the names of flags instead of those of options: `` `page_size` `` is `--page-size`.
pub fn in_flags(message: &str) -> String {
    let command = ServerArgs::command();
    let mut text = message.to_owned();
    for flag in command.get_arguments() {
        if let Some(long) = flag.get_long() {
            text = text.replace(&format!("`{}`", flag.get_id()), &format!("--{long}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use bcg_server::{ApiKey, HttpOptions};

    use super::*;

    fn try_parse(flags: &[&str]) -> Result<ServerArgs, clap::Error> {
        ServerArgs::try_parse_from(["bcg-server", "--model", "m"].iter().chain(flags))
    }

    fn parse(flags: &[&str]) -> EngineArgs {
        try_parse(flags).expect("flags parse").engine
    }

    fn works(flags: &[&str]) -> EngineOptions {
        let options = parse(flags).options();
        options.check().expect("works");
        options
    }

    #[track_caller]
    fn refused(flags: &[&str], flag: &str, remedy: &str) {
        let error = parse(flags).options().check().expect_err("these flags cannot work");
        let error = in_flags(&error.to_string());
        assert!(error.starts_with(&format!("{flag}: ")) && error.contains(remedy), "{error}");
    }

    #[test]
    fn defaults_are_the_same_with_and_without_flags() {
        let args = try_parse(&[]).expect("parses");
        assert_eq!(args.engine.options(), EngineOptions::new("m"));
        assert_eq!(args.http.options(), HttpOptions::default());
    }

    #[test]
    fn a_flag_is_its_option_with_dashes() {
        for flag in ServerArgs::command().get_arguments() {
            let long = flag.get_long().expect("every flag has a name");
            assert!(["help", "version"].contains(&long) || long == flag.get_id().as_str().replace('_', "-"), "{long}");
        }
        assert_eq!(
            in_flags("`page_size`: lower `context_length`, not `x`"),
            "--page-size: lower --context-length, not `x`"
        );
    }

    #[test]
    fn every_flag_reaches_its_option() {
        let on = "--enable-breakable-cuda-graph";
        let options = works(&[on, "--cuda-graph-sizes", "8,1,8,4", "--device", "host", "--load-format", "dummy"]);
        assert!(options.enable_breakable_cuda_graph);
        assert_eq!(options.cuda_graph_sizes, Some(vec![8, 1, 8, 4]));
        assert_eq!((options.device, options.load_format), (DeviceChoice::Host, LoadFormat::Dummy));
        let options = works(&["--max-queued-choices", "9", "--queue-timeout", "7"]);
        assert_eq!((options.max_queued_choices, options.queue_timeout), (9, Duration::from_secs(7)));
        assert_eq!(works(&["--watchdog-timeout", "8"]).watchdog_timeout, Duration::from_secs(8));
        let [graphs, mib] = ["--cuda-graph-lazy-max-graphs", "--cuda-graph-lazy-max-mib"];
        let options = works(&[on, "--capture", "lazy", graphs, "9", mib, "64"]);
        assert_eq!(options.capture, CaptureMode::Lazy);
        assert_eq!((options.cuda_graph_lazy_max_graphs, options.cuda_graph_lazy_max_mib), (Some(9), Some(64)));
    }

    #[test]
    fn an_empty_ladder_is_refused_with_a_remedy() {
        refused(
            &["--enable-breakable-cuda-graph", "--cuda-graph-sizes"],
            "--cuda-graph-sizes",
            "drop it for the default",
        );
        refused(
            &["--enable-breakable-cuda-graph", "--cuda-graph-max-tokens", "0"],
            "--cuda-graph-max-tokens",
            "drop --enable-breakable-cuda-graph",
        );
    }

    #[test]
    fn graph_flags_without_graphs_are_refused() {
        refused(&["--cuda-graph-sizes", "1,2"], "--cuda-graph-sizes", "add --enable-breakable-cuda-graph");
        refused(&["--capture", "lazy"], "--capture", "add --enable-breakable-cuda-graph");
        refused(&["--verify-graph", "3"], "--verify-graph", "add --enable-breakable-cuda-graph");
        let budget = "--cuda-graph-lazy-max-mib";
        refused(&[budget, "64"], budget, "add --enable-breakable-cuda-graph");
    }

    #[test]
    fn lazy_graphs_have_a_budget_and_others_have_none() {
        let on = "--enable-breakable-cuda-graph";
        for flag in ["--cuda-graph-lazy-max-graphs", "--cuda-graph-lazy-max-mib"] {
            refused(&[on, flag, "9"], flag, "add --capture lazy");
            refused(&[on, "--capture", "lazy", flag, "0"], flag, "at least 1");
        }
    }

    #[test]
    fn contradicting_flags_are_refused() {
        let on = "--enable-breakable-cuda-graph";
        refused(&[on, "--capture", "lazy", "--cuda-graph-sizes", "1"], "--cuda-graph-sizes", "drop one");
        refused(&[on, "--cuda-graph-sizes", "64", "--cuda-graph-max-tokens", "32"], "--cuda-graph-sizes", "raise");
        refused(&[on, "--cuda-graph-sizes", "4096"], "--cuda-graph-sizes", "raise --chunked-prefill-size");
        refused(&["--kv-cache-tokens", "64", "--context-length", "128"], "--kv-cache-tokens", "lower --context-length");
        refused(
            &["--max-running-requests", "100", "--chunked-prefill-size", "64"],
            "--chunked-prefill-size",
            "lower --max-running-requests",
        );
    }

    #[test]
    fn each_rank_has_a_device() {
        let options = works(&["--tp", "2", "--devices", "0,0"]);
        assert_eq!((options.tp, options.devices), (2, Some(vec![0, 0])));
        let options = works(&["--tp", "2", "--pp", "2", "--devices", "0,1,0,1"]);
        assert_eq!((options.tp, options.pp, options.devices), (2, 2, Some(vec![0, 1, 0, 1])));
        refused(&["--pp", "0"], "--pp", "at least 1");
        refused(&["--pp", "2", "--devices", "0"], "--devices", "for each rank");
        refused(&["--tp", "9"], "--tp", "at most 8");
        refused(&["--tp", "0"], "--tp", "at least 1");
        refused(&["--tp", "2", "--devices", "0"], "--devices", "for each rank");
        refused(&["--devices", "0,1"], "--devices", "for each rank");
        refused(&["--device", "host", "--tp", "2", "--devices", "0,1"], "--devices", "drop it");
        for wrong in ["0,one", "-1", "0;1", ""] {
            try_parse(&["--devices", wrong]).expect_err("no numbers");
        }
    }

    #[test]
    fn each_replica_has_devices_of_its_own() {
        let options = works(&["--dp-size", "2", "--tp", "2", "--devices", "0,1,2,3"]);
        assert_eq!((options.dp, options.tp), (2, 2));
        refused(&["--dp", "0"], "--dp", "at least 1");
        refused(&["--dp", "2", "--devices", "0"], "--devices", "for each rank");
        refused(&["--dp", "2", "--devices", "0,0"], "--devices", "give --kv-cache-tokens");
        works(&["--dp", "2", "--devices", "0,0", "--kv-cache-tokens", "4096"]);
    }

    #[test]
    fn ranks_have_experts_of_their_own() {
        let options = works(&["--ep", "4"]);
        assert_eq!((options.tp, options.ep), (4, 4), "the flag alone makes the ranks, too");
        assert_eq!(works(&["--tp", "2"]).ep, 1);
        works(&["--tp", "2", "--ep-size", "2"]);
        for flags in [["--tp", "4", "--ep", "2"], ["--tp", "1", "--ep", "2"]] {
            refused(&flags, "--ep", "the same number");
        }
        refused(&["--ep", "0"], "--ep", "at least 1");
        assert_eq!(works(&["--ep", "2", "--moe-a2a-backend", "push"]).moe_a2a_backend, MoeA2a::Push);
        refused(&["--tp", "2", "--moe-a2a-backend", "push"], "--moe-a2a-backend", "add --ep");
    }

    #[test]
    fn a_command_that_needs_text_names_the_flag() {
        let args = parse(&["--load-format", "dummy", "--skip-tokenizer-init"]);
        let error = args.text_options("bcg eval").expect_err("no text").to_string();
        assert_eq!(error, "--skip-tokenizer-init: bcg eval reads and writes text; drop the flag");
        parse(&[]).text_options("bcg eval").expect("there is a tokenizer");
    }

    #[test]
    fn a_fraction_of_the_memory_is_one() {
        refused(&["--mem-fraction-static", "90"], "--mem-fraction-static", "such as 0.9");
        assert_eq!(works(&["--mem-fraction-static", "0.5"]).mem_fraction_static, Some(0.5));
    }

    #[test]
    fn flags_of_http_that_cannot_work_name_the_remedy() {
        for (flag, value, remedy) in [
            ("--max-connections", "0", "at least 1"),
            ("--request-read-timeout", "0", "at least 1 second"),
            ("--response-write-timeout", "0", "at least 1 second"),
            ("--shutdown-deadline", "18446744073709551615", "at most 2147483647 seconds"),
            ("--max-inflight-body-bytes", "1000", "lower --max-body-bytes"),
            ("--cors-allow-origin", "chat.example.com", "give a scheme and a host"),
            ("--cors-allow-origin", "https://chat.example.com/", "give a scheme and a host"),
            ("--otlp-endpoint", "127.0.0.1:4318", "http://"),
        ] {
            let error = try_parse(&[flag, value]).expect("parses").http.options().check().expect_err("refused");
            let error = in_flags(&format!("{:#}", anyhow::Error::from(error)));
            assert!(error.starts_with(flag) && error.contains(remedy), "{error}");
        }
        for flags in [&["--tls-cert", "c.pem"], &["--tls-key", "k.pem"], &["--api-key", ""], &["--api-key", "a b"]] {
            try_parse(flags).expect_err("refused");
        }
        let keys = try_parse(&["--api-key", "a", "--api-key", "b,c"]).expect("parses").http.options().api_key;
        assert_eq!(keys, ["a", "b", "c"].map(|key| key.parse::<ApiKey>().expect("a key")));
        assert!(!format!("{:?}", try_parse(&["--api-key", "secret"]).expect("parses")).contains("secret"));
    }

    #[test]
    fn sglang_names_are_understood() {
        let args =
            ServerArgs::try_parse_from(["x", "--model-path", "m", "--max-total-tokens", "4096"]).expect("parses");
        assert_eq!(args.engine.kv_cache_tokens, Some(4096));
        assert_eq!(works(&["--tensor-parallel-size", "4"]).tp, 4);
    }
}
