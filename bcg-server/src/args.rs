//! Command line flags, shared by the binaries, and the checks across them.
//!
//! Flags carry SGLang's names where SGLang has one. [`EngineArgs::plan`] turns the raw flags into an [`EnginePlan`]
//! or says which flag is wrong and what to do about it; nothing after it looks at raw flags again.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};

use crate::api::HttpArgs;

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// CUDA if there is a usable GPU, else the host device.
    Auto,
    /// The emulated device; needs no GPU.
    Host,
    /// The first CUDA GPU; an error if there is none.
    Cuda,
}

/// When graphs are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CaptureArg {
    /// Every size of the ladder before the first request is served.
    Ahead,
    /// The exact size of each step, when it first runs.
    Lazy,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormatArg {
    /// The checkpoint's safetensors files.
    Auto,
    /// Random numbers made on the device; needs config.json only.
    Dummy,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One readable line per event.
    Text,
    /// One JSON object per event.
    Json,
}

/// Flags of everything that runs a model: the server, `bcg generate`, `bcg eval`, `bcg inspect`.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// Folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json)
    #[arg(long, alias = "model-path", value_name = "DIR")]
    pub model: PathBuf,

    /// Where the weights come from: dummy makes random ones on the device and needs config.json only
    #[arg(long, value_enum, default_value_t = LoadFormatArg::Auto)]
    pub load_format: LoadFormatArg,

    /// Run without tokenizer.json: prompts are token ids, and answers too
    #[arg(long)]
    pub skip_tokenizer_init: bool,

    /// Where to run: auto picks CUDA if there is a usable GPU, else the host device
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    pub device: DeviceArg,

    /// Replay prefills as breakable CUDA graphs, and decodes as full ones
    #[arg(long)]
    pub enable_breakable_cuda_graph: bool,

    /// Largest token count that gets a graph; larger steps run eagerly
    #[arg(long, value_name = "TOKENS")]
    pub cuda_graph_max_tokens: Option<usize>,

    /// Token counts of prefills to capture, separated by commas, instead of the default ladder
    #[arg(long, value_name = "T,T,…", value_delimiter = ',', num_args = 0..)]
    pub cuda_graph_sizes: Option<Vec<usize>>,

    /// Batch sizes of decodes to capture, separated by commas, instead of the default ladder
    #[arg(long, value_name = "B,B,…", value_delimiter = ',', num_args = 0..)]
    pub cuda_graph_decode_sizes: Option<Vec<usize>>,

    /// When graphs are captured
    #[arg(long, value_enum, default_value_t = CaptureArg::Ahead)]
    pub capture: CaptureArg,

    /// With --capture lazy: graphs held at most, of prefills and again of decodes; the least recently used goes first
    /// [default: 128]
    #[arg(long, value_name = "N")]
    pub cuda_graph_lazy_max_graphs: Option<usize>,

    /// With --capture lazy: GPU memory that graphs take at most, of prefills and again of decodes, in MiB; the least
    /// recently used goes first [default: 256]
    #[arg(long, value_name = "MIB")]
    pub cuda_graph_lazy_max_mib: Option<usize>,

    /// Run each captured forward as one eager break, to tell a graph problem from a model problem
    #[arg(long)]
    pub debug_cuda_graph: bool,

    /// Compare every Nth replay with an eager run of the same step
    #[arg(long, value_name = "N")]
    pub verify_graph: Option<u32>,

    /// Fill freed graph memory with a pattern that shows up when it is read
    #[arg(long)]
    pub poison_graph_memory: bool,

    /// Sequences that decode together at most
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_running_requests: usize,

    /// Requests that may wait; one more is refused (HTTP 429)
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_queued_requests: usize,

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
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    pub page_size: usize,

    /// Tokens in one step at most, the newest ones of answers first; a longer prompt is prefilled in chunks
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
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

    /// Name of the model in the API [default: the checkpoint folder's name]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,

    /// How log lines are written
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// Flags of the HTTP layer.
    #[command(flatten)]
    pub http: HttpArgs,
}

/// How graphs are used, after the flags were checked against each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GraphPlan {
    /// Every step runs eagerly.
    Off,
    /// Graphs of all sizes are captured at start.
    Ahead,
    /// Graphs are captured when first needed.
    Lazy,
}

/// The checked form of [`EngineArgs`].
#[derive(Debug, Clone, PartialEq)]
pub struct EnginePlan {
    /// Checkpoint folder.
    pub model: PathBuf,
    /// Where the weights come from.
    pub load_format: LoadFormatArg,
    /// No text, only token ids.
    pub skip_tokenizer: bool,
    /// Where to run.
    pub device: DeviceArg,
    /// Whether and when graphs are captured.
    pub graph: GraphPlan,
    /// Sizes to capture, ascending; `None` takes the default ladder.
    pub graph_sizes: Option<Vec<usize>>,
    /// Batch sizes of decodes to capture; `None` takes the default ladder.
    pub decode_graph_sizes: Option<Vec<usize>>,
    /// Largest token count that gets a graph; `None` takes the default.
    pub graph_max_tokens: Option<usize>,
    /// Graphs of each phase that are held while graphs are captured lazily; `None` takes the default.
    pub lazy_graphs_max: Option<usize>,
    /// Their device memory in bytes, again of each phase; `None` takes the default.
    pub lazy_graph_bytes_max: Option<usize>,
    /// Whole forward as one break.
    pub debug_graph: bool,
    /// Compare every Nth replay with an eager run.
    pub verify_graph: Option<u32>,
    /// Poison freed graph memory.
    pub poison: bool,
    /// Sequences that decode together at most.
    pub max_running: usize,
    /// Requests that may wait.
    pub max_queued: usize,
    /// Tokens of prompt and answer together at most; `None` takes the model's.
    pub context_length: Option<usize>,
    /// Tokens in the KV cache; `None` sizes it from the model.
    pub kv_cache_tokens: Option<usize>,
    /// Part of the device's memory for all that the model takes; `None` takes the default.
    pub mem_fraction_static: Option<f64>,
    /// Tokens in one page.
    pub page_size: usize,
    /// Tokens in one prefill step at most.
    pub max_batch_tokens: usize,
    /// No prompt shares the pages of another one.
    pub disable_radix_cache: bool,
}

/// A flag, or a combination of flags, that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{flag}: {problem}; {remedy}")]
pub struct ArgError {
    /// The flag to look at.
    pub flag: &'static str,
    /// What is wrong with it.
    pub problem: String,
    /// What to do about it.
    pub remedy: &'static str,
}

impl ArgError {
    fn new(flag: &'static str, problem: impl Into<String>, remedy: &'static str) -> Self {
        Self { flag, problem: problem.into(), remedy }
    }
}

impl EnginePlan {
    /// Refuses to go on without a tokenizer.
    ///
    /// # Errors
    /// [`ArgError`] if `--skip-tokenizer-init` was given.
    pub fn require_tokenizer(&self, command: &str) -> Result<(), ArgError> {
        if !self.skip_tokenizer {
            return Ok(());
        }
        Err(ArgError::new("--skip-tokenizer-init", format!("{command} reads and writes text"), "drop the flag"))
    }
}

impl EngineArgs {
    /// Checks the flags against each other.
    ///
    /// # Errors
    /// [`ArgError`] names the flag, the problem and the remedy.
    pub fn plan(&self) -> Result<EnginePlan, ArgError> {
        self.check_counts()?;
        let graph = self.check_graph()?;
        let graph_sizes = self.check_sizes()?;
        let decode_graph_sizes = self.sorted_sizes("--cuda-graph-decode-sizes", &self.cuda_graph_decode_sizes)?;
        Ok(EnginePlan {
            model: self.model.clone(),
            load_format: self.load_format,
            skip_tokenizer: self.skip_tokenizer_init,
            device: self.device,
            graph,
            graph_sizes,
            decode_graph_sizes,
            graph_max_tokens: self.cuda_graph_max_tokens,
            lazy_graphs_max: self.cuda_graph_lazy_max_graphs,
            lazy_graph_bytes_max: self.cuda_graph_lazy_max_mib.map(|mib| mib.saturating_mul(1 << 20)),
            debug_graph: self.debug_cuda_graph,
            verify_graph: self.verify_graph,
            poison: self.poison_graph_memory,
            max_running: self.max_running_requests,
            max_queued: self.max_queued_requests,
            context_length: self.context_length,
            kv_cache_tokens: self.kv_cache_tokens,
            mem_fraction_static: self.mem_fraction_static,
            page_size: self.page_size,
            max_batch_tokens: self.chunked_prefill_size,
            disable_radix_cache: self.disable_radix_cache,
        })
    }

    fn check_counts(&self) -> Result<(), ArgError> {
        let positive: [(&'static str, Option<usize>); 8] = [
            ("--max-running-requests", Some(self.max_running_requests)),
            ("--max-queued-requests", Some(self.max_queued_requests)),
            ("--page-size", Some(self.page_size)),
            ("--chunked-prefill-size", Some(self.chunked_prefill_size)),
            ("--context-length", self.context_length),
            ("--kv-cache-tokens", self.kv_cache_tokens),
            ("--cuda-graph-lazy-max-graphs", self.cuda_graph_lazy_max_graphs),
            ("--cuda-graph-lazy-max-mib", self.cuda_graph_lazy_max_mib),
        ];
        for (flag, value) in positive {
            if value == Some(0) {
                return Err(ArgError::new(flag, "is 0", "give a number of at least 1"));
            }
        }
        if self.chunked_prefill_size < self.max_running_requests {
            return Err(ArgError::new(
                "--chunked-prefill-size",
                format!(
                    "a step of {} tokens cannot hold the {} sequences of --max-running-requests",
                    self.chunked_prefill_size, self.max_running_requests
                ),
                "raise it or lower --max-running-requests",
            ));
        }
        if let Some(fraction) = self.mem_fraction_static
            && !(fraction > 0.0 && fraction <= 1.0)
        {
            return Err(ArgError::new("--mem-fraction-static", format!("is {fraction}"), "give a part such as 0.9"));
        }
        if let Some(tokens) = self.kv_cache_tokens {
            let least = self.context_length.unwrap_or(0).max(self.page_size);
            if tokens < least {
                return Err(ArgError::new(
                    "--kv-cache-tokens",
                    format!("{tokens} tokens cannot hold one sequence of {least}"),
                    "raise it or lower --context-length",
                ));
            }
        }
        Ok(())
    }

    fn check_graph(&self) -> Result<GraphPlan, ArgError> {
        const REMEDY: &str = "add --enable-breakable-cuda-graph or drop this flag";
        if !self.enable_breakable_cuda_graph {
            let given: [(&'static str, bool); 9] = [
                ("--cuda-graph-max-tokens", self.cuda_graph_max_tokens.is_some()),
                ("--cuda-graph-sizes", self.cuda_graph_sizes.is_some()),
                ("--cuda-graph-decode-sizes", self.cuda_graph_decode_sizes.is_some()),
                ("--capture", self.capture != CaptureArg::Ahead),
                ("--cuda-graph-lazy-max-graphs", self.cuda_graph_lazy_max_graphs.is_some()),
                ("--cuda-graph-lazy-max-mib", self.cuda_graph_lazy_max_mib.is_some()),
                ("--debug-cuda-graph", self.debug_cuda_graph),
                ("--verify-graph", self.verify_graph.is_some()),
                ("--poison-graph-memory", self.poison_graph_memory),
            ];
            return match given.into_iter().find(|(_, given)| *given) {
                Some((flag, _)) => Err(ArgError::new(flag, "has no effect while graphs are off", REMEDY)),
                None => Ok(GraphPlan::Off),
            };
        }
        if self.verify_graph == Some(0) {
            return Err(ArgError::new(
                "--verify-graph",
                "every 0th replay is none",
                "give at least 1, which checks every replay",
            ));
        }
        let first =
            |flags: [(&'static str, bool); 2]| flags.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag);
        let sizes = first([
            ("--cuda-graph-sizes", self.cuda_graph_sizes.is_some()),
            ("--cuda-graph-decode-sizes", self.cuda_graph_decode_sizes.is_some()),
        ]);
        let budget = first([
            ("--cuda-graph-lazy-max-graphs", self.cuda_graph_lazy_max_graphs.is_some()),
            ("--cuda-graph-lazy-max-mib", self.cuda_graph_lazy_max_mib.is_some()),
        ]);
        match (self.capture, sizes, budget) {
            (CaptureArg::Ahead, _, None) => Ok(GraphPlan::Ahead),
            (CaptureArg::Lazy, None, _) => Ok(GraphPlan::Lazy),
            (CaptureArg::Lazy, Some(flag), _) => Err(ArgError::new(
                flag,
                "--capture lazy captures the exact sizes it meets",
                "drop one of the two flags",
            )),
            (CaptureArg::Ahead, _, Some(flag)) => Err(ArgError::new(
                flag,
                "every size of the ladder is captured ahead and kept",
                "add --capture lazy or drop this flag",
            )),
        }
    }

    /// Sorts the sizes of a flag, if it was given, and refuses none and 0.
    fn sorted_sizes(&self, flag: &'static str, sizes: &Option<Vec<usize>>) -> Result<Option<Vec<usize>>, ArgError> {
        let Some(mut sizes) = sizes.clone() else { return Ok(None) };
        sizes.sort_unstable();
        sizes.dedup();
        match sizes.first() {
            None => Err(ArgError::new(
                flag,
                "names no size, so nothing could be captured",
                "give sizes such as 1,2,4,8, drop it for the default ladder, or drop --enable-breakable-cuda-graph",
            )),
            Some(0) => Err(ArgError::new(flag, "0 is no size", "give sizes of at least 1")),
            Some(_) => Ok(Some(sizes)),
        }
    }

    fn check_sizes(&self) -> Result<Option<Vec<usize>>, ArgError> {
        const FLAG: &str = "--cuda-graph-sizes";
        if self.cuda_graph_max_tokens == Some(0) {
            return Err(ArgError::new(
                "--cuda-graph-max-tokens",
                "0 leaves no size to capture",
                "give at least 1 or drop --enable-breakable-cuda-graph",
            ));
        }
        let Some(sizes) = self.sorted_sizes(FLAG, &self.cuda_graph_sizes)? else { return Ok(None) };
        let most = sizes[sizes.len() - 1];
        if most > self.chunked_prefill_size {
            return Err(ArgError::new(
                FLAG,
                format!("no step has {most} tokens, --chunked-prefill-size is {}", self.chunked_prefill_size),
                "raise --chunked-prefill-size or drop that size",
            ));
        }
        if let Some(max) = self.cuda_graph_max_tokens
            && most > max
        {
            return Err(ArgError::new(
                FLAG,
                format!("{most} is above --cuda-graph-max-tokens {max}"),
                "raise --cuda-graph-max-tokens or drop that size",
            ));
        }
        Ok(Some(sizes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: &[&str]) -> EngineArgs {
        let mut line = vec!["bcg-server", "--model", "m"];
        line.extend(flags);
        ServerArgs::try_parse_from(line).expect("flags parse").engine
    }

    #[track_caller]
    fn refused(flags: &[&str], flag: &str, remedy: &str) {
        let error = parse(flags).plan().expect_err("these flags cannot work");
        assert_eq!(error.flag, flag);
        assert!(error.to_string().contains(remedy), "{error}");
    }

    #[test]
    fn defaults_run_eagerly() {
        let plan = parse(&[]).plan().expect("defaults work");
        assert_eq!(plan.graph, GraphPlan::Off);
        assert_eq!(plan.graph_sizes, None);
    }

    #[test]
    fn one_flag_turns_graphs_on() {
        let plan = parse(&["--enable-breakable-cuda-graph"]).plan().expect("works");
        assert_eq!(plan.graph, GraphPlan::Ahead);
    }

    #[test]
    fn sizes_are_sorted_and_unique() {
        let plan = parse(&["--enable-breakable-cuda-graph", "--cuda-graph-sizes", "8,1,8,4"]).plan().expect("works");
        assert_eq!(plan.graph_sizes, Some(vec![1, 4, 8]));
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
        let [graphs, mib] = ["--cuda-graph-lazy-max-graphs", "--cuda-graph-lazy-max-mib"];
        let plan = parse(&[on, "--capture", "lazy", graphs, "9", mib, "64"]).plan().expect("works");
        assert_eq!(
            (plan.graph, plan.lazy_graphs_max, plan.lazy_graph_bytes_max),
            (GraphPlan::Lazy, Some(9), Some(64 << 20))
        );
        for flag in [graphs, mib] {
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
    fn a_command_that_needs_text_names_the_flag() {
        let plan = parse(&["--load-format", "dummy", "--skip-tokenizer-init"]).plan().expect("works");
        assert_eq!(plan.load_format, LoadFormatArg::Dummy);
        let error = plan.require_tokenizer("bcg eval").expect_err("no text").to_string();
        assert_eq!(error, "--skip-tokenizer-init: bcg eval reads and writes text; drop the flag");
        parse(&[]).plan().expect("works").require_tokenizer("bcg eval").expect("there is a tokenizer");
    }

    #[test]
    fn a_fraction_of_the_memory_is_one() {
        refused(&["--mem-fraction-static", "90"], "--mem-fraction-static", "such as 0.9");
        assert_eq!(parse(&["--mem-fraction-static", "0.5"]).plan().expect("works").mem_fraction_static, Some(0.5));
    }

    #[test]
    fn sglang_names_are_understood() {
        let args =
            ServerArgs::try_parse_from(["x", "--model-path", "m", "--max-total-tokens", "4096"]).expect("parses");
        assert_eq!(args.engine.kv_cache_tokens, Some(4096));
    }
}
