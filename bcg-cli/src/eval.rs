//! `bcg eval`: answers every problem of a JSONL file and prints the accuracy.
//!
//! A line is `{"question": …, "answer": …, "number": …}`; an answer is right if the number after its last `####` is the
//! problem's. Decoding is greedy, so two runs of one model give the same tokens; `--dump` writes them for comparison.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use bcg_benches::progress::{LoadBar, bar};
use bcg_engine::{ChatMessage, Engine, EngineEvent, GenerationRequest, Metrics, Prompt, replicas};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::args::EngineArgs;

/// Flags of `bcg eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Problems, one JSON object per line
    pub file: PathBuf,

    /// Flags of the engine.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Ask with the examples of this JSON file instead of the chat template
    #[arg(long, value_name = "FILE")]
    pub few_shot: Option<PathBuf>,

    /// Problems that are answered at the same time
    #[arg(long, default_value_t = 8)]
    pub concurrency: usize,

    /// Tokens of an answer at most
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,

    /// Answer the first N problems only
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,

    /// Write each problem's answer and tokens to this JSONL file, in the order of the problems
    #[arg(long, value_name = "FILE")]
    pub dump: Option<PathBuf>,

    /// Fail if the accuracy is below this
    #[arg(long, value_name = "FRACTION")]
    pub min_accuracy: Option<f64>,
}

/// One problem.
#[derive(Debug, Clone, Deserialize)]
struct Problem {
    question: String,
    #[serde(default)]
    answer: String,
    number: Option<f64>,
}

/// What came of one problem, as `--dump` writes it.
#[derive(Debug, Clone, Serialize)]
struct Answer {
    index: usize,
    correct: bool,
    text: String,
    tokens: Vec<u32>,
}

/// Runs the command.
///
/// # Errors
/// What is wrong with the flags, the files or the model; the first answer that failed; an accuracy below the bound.
pub fn run(args: &EvalArgs) -> anyhow::Result<()> {
    ensure!(args.concurrency > 0, "--concurrency: is 0; give a number of at least 1");
    let mut problems = read_problems(&args.file)?;
    problems.truncate(args.limit.unwrap_or(usize::MAX));
    ensure!(!problems.is_empty(), "{}: has no problems", args.file.display());
    let shots = args.few_shot.as_ref().map(read_shots).transpose()?;
    let mut options = args.engine.text_options("bcg eval")?;
    options.let_wait(args.concurrency);
    let engine = replicas::start(&options, LoadBar::show())?;

    let began = Instant::now();
    let answers = answer_all(&engine, &problems, shots.as_deref(), args)?;
    let seconds = began.elapsed().as_secs_f64();

    if let Some(path) = &args.dump {
        let mut file = std::io::BufWriter::new(fs::File::create(path).with_context(|| path.display().to_string())?);
        for answer in &answers {
            writeln!(file, "{}", serde_json::to_string(answer)?)?;
        }
        file.flush()?;
    }
    let correct = answers.iter().filter(|answer| answer.correct).count();
    let tokens: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
    let accuracy = correct as f64 / answers.len() as f64;
    let metrics = engine.replica_metrics();
    let sum = |count: fn(&Metrics) -> u64| metrics.iter().map(|metrics| count(metrics)).sum::<u64>();
    println!(
        "accuracy {accuracy:.4} ({correct}/{}) {}, {tokens} tokens in {seconds:.1} s ({:.1} tok/s), {} replays, {} captures, {} eager forwards, {} preemptions",
        answers.len(),
        if shots.is_some() { "few-shot" } else { "chat" },
        tokens as f64 / seconds.max(1e-9),
        sum(|metrics| metrics.graph_replays.get()),
        sum(|metrics| metrics.graph_captures.get()),
        sum(Metrics::num_eager),
        sum(|metrics| metrics.preemptions.get()),
    );
    if let Some(least) = args.min_accuracy
        && accuracy < least
    {
        bail!("accuracy {accuracy:.4} is below --min-accuracy {least}");
    }
    Ok(())
}

fn read_problems(path: &PathBuf) -> anyhow::Result<Vec<Problem>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(at, line)| serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), at + 1)))
        .collect()
}

fn read_shots(path: &PathBuf) -> anyhow::Result<String> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let shots: Vec<Problem> = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(shots.iter().map(|shot| format!("Question: {}\nAnswer: {}\n\n", shot.question, shot.answer)).collect())
}

fn answer_all(
    engine: &impl Engine,
    problems: &[Problem],
    shots: Option<&str>,
    args: &EvalArgs,
) -> anyhow::Result<Vec<Answer>> {
    let bar = bar(problems.len() as u64, "{msg:>17} [{bar:40}] {pos}/{len} {eta}", "answering");
    let next = AtomicUsize::new(0);
    let (sender, results) = mpsc::channel();
    let mut answers: Vec<Option<Answer>> = vec![None; problems.len()];
    std::thread::scope(|scope| -> anyhow::Result<()> {
        for _ in 0..args.concurrency.min(problems.len()) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(problem) = problems.get(index) else { break };
                    let answer = answer_one(engine, index, problem, shots, args.max_tokens);
                    if sender.send(answer).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for answer in results {
            let answer = answer.inspect_err(|_| next.store(problems.len(), Ordering::Relaxed))?;
            bar.inc(1);
            let index = answer.index;
            answers[index] = Some(answer);
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    answers.into_iter().collect::<Option<Vec<_>>>().context("a problem was not answered")
}

fn answer_one(
    engine: &impl Engine,
    index: usize,
    problem: &Problem,
    shots: Option<&str>,
    max_tokens: usize,
) -> anyhow::Result<Answer> {
    let mut request = GenerationRequest::greedy(match shots {
        Some(shots) => Prompt::Text(format!("{shots}Question: {}\nAnswer: ", problem.question)),
        None => Prompt::chat(vec![ChatMessage::new("user", problem.question.as_str())]),
    });
    request.max_tokens = Some(max_tokens);
    if shots.is_some() {
        request.stop = vec!["\n".to_owned()];
    }
    let mut events = engine.submit(request).with_context(|| format!("problem {}", index + 1))?;
    let mut answer = Answer { index, correct: false, text: String::new(), tokens: Vec::new() };
    while let Some(event) = events.next_blocking() {
        match event {
            EngineEvent::Delta(delta) => {
                answer.text += &delta.text;
                answer.tokens.extend(delta.tokens);
            }
            EngineEvent::Finished { .. } => {}
            EngineEvent::Failed(message) => bail!("problem {}: {message}", index + 1),
        }
    }
    let expected = problem.number.or_else(|| final_number(&problem.answer));
    answer.correct = expected.is_some() && final_number(&answer.text) == expected;
    Ok(answer)
}

/// Returns the number after the last `####`.
fn final_number(text: &str) -> Option<f64> {
    let (_, tail) = text.rsplit_once("####")?;
    let word = tail.split_whitespace().next()?;
    word.replace([',', '$'], "").trim_end_matches('.').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_after_the_last_mark_counts() {
        assert_eq!(final_number("62+70=132 132-49=83 #### 83"), Some(83.0));
        assert_eq!(final_number("#### 1 #### 1,234.\n"), Some(1234.0));
        assert_eq!(final_number("83"), None);
        assert_eq!(final_number("#### many"), None);
    }

    #[test]
    fn the_repositorys_problems_are_readable() {
        let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
        let problems = read_problems(&data.join("mini_gsm_test.jsonl")).expect("problems");
        assert_eq!(problems.len(), 200);
        assert!(problems.iter().all(|problem| final_number(&problem.answer) == problem.number));
        let shots = read_shots(&data.join("mini_gsm_shots.json")).expect("shots");
        assert_eq!(shots.matches("Question: ").count(), 5);
        assert!(shots.ends_with("#### 0\n\n"));
    }
}
