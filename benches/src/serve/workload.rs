//! What is asked, and when: prompts, lengths and arrivals, all drawn from one seed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use axum::body::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::{Endpoint, ServeArgs};

/// Words of one token each in most vocabularies.
const WORDS: [&str; 32] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "number", "night", "point", "home",
];

/// Makes the bodies of requests, one after the other.
#[derive(Debug)]
pub(super) struct Workload<'a> {
    args: &'a ServeArgs,
    model: &'a str,
    rng: SmallRng,
    /// Token ids, or indices of words, which the prompts of a group begin with.
    prefixes: Vec<Vec<u32>>,
    /// The prompts of the dataset, if one was given.
    texts: Option<Vec<String>>,
    made: usize,
}

impl<'a> Workload<'a> {
    /// Draws the shared prefixes, or reads the dataset.
    ///
    /// # Errors
    /// The dataset's line without a prompt.
    pub(super) fn new(args: &'a ServeArgs, model: &'a str) -> Result<Self> {
        let texts = args.dataset.as_deref().map(read_dataset).transpose()?;
        let mut workload =
            Self { args, model, rng: SmallRng::seed_from_u64(args.seed), prefixes: Vec::new(), texts, made: 0 };
        for _ in 0..args.num_prefixes {
            let prefix = workload.draw(args.shared_prefix_len);
            workload.prefixes.push(prefix);
        }
        Ok(workload)
    }

    /// Makes the next body.
    pub(super) fn body(&mut self) -> Bytes {
        let prompt = self.prompt();
        let output_len = self.length(self.args.output_len);
        self.made += 1;
        let mut body = json!({
            "model": self.model, "max_tokens": output_len, "temperature": 0,
            "stream": true, "stream_options": {"include_usage": true},
        });
        match self.args.endpoint {
            Endpoint::Completions => body["prompt"] = prompt,
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": prompt}]),
        }
        if self.args.ignore_eos.unwrap_or(self.texts.is_none()) {
            body["ignore_eos"] = json!(true);
        }
        body.to_string().into()
    }

    fn prompt(&mut self) -> Value {
        if let Some(texts) = &self.texts {
            return json!(texts[self.made % texts.len()]);
        }
        let length = self.length(self.args.input_len);
        let mut items = self.prefixes[self.made % self.prefixes.len()].clone();
        items.extend(self.draw(length));
        match self.args.endpoint {
            Endpoint::Completions => json!(items),
            Endpoint::Chat => {
                let words: Vec<&str> = items.iter().map(|&item| WORDS[item as usize]).collect();
                json!(words.join(" "))
            }
        }
    }

    /// Draws token ids, or indices of words for a chat.
    fn draw(&mut self, length: usize) -> Vec<u32> {
        let bound = match self.args.endpoint {
            Endpoint::Completions => self.args.vocab_size,
            Endpoint::Chat => WORDS.len() as u32,
        };
        (0..length).map(|_| self.rng.random_range(0..bound)).collect()
    }

    /// Draws a length between `most` times the ratio and `most`, but at least 1.
    fn length(&mut self, most: usize) -> usize {
        let least = ((most as f64 * self.args.range_ratio) as usize).max(1);
        self.rng.random_range(least..=most)
    }
}

fn read_dataset(path: &Path) -> Result<Vec<String>> {
    let at = format!("--dataset {}", path.display());
    let text = fs::read_to_string(path).with_context(|| at.clone())?;
    let mut prompts = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let object: Value = serde_json::from_str(line).with_context(|| format!("{at}: line {}", index + 1))?;
        match ["prompt", "question"].iter().find_map(|name| object[name].as_str()) {
            Some(prompt) => prompts.push(prompt.to_owned()),
            None => bail!("{at}: line {} has neither a `prompt` nor a `question` that is text", index + 1),
        }
    }
    ensure!(!prompts.is_empty(), "{at}: it has no line; each line is an object with a `prompt` or a `question`");
    Ok(prompts)
}

/// Draws when requests arrive: `rate` of them a second, with gaps as of a Poisson process, or all at once if it is
/// infinite.
pub(super) fn arrivals(count: usize, rate: f64, seed: u64) -> Vec<Duration> {
    // Another stream of numbers than the prompts', so that prompts do not depend on the rate.
    let mut rng = SmallRng::seed_from_u64(!seed);
    let mut at = 0.0;
    let mut next = || {
        let arrival = Duration::from_secs_f64(at);
        at -= (1.0 - rng.random::<f64>()).ln() / rate;
        arrival
    };
    (0..count).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::parse;
    use super::*;

    fn bodies(flags: &[&str], count: usize) -> Vec<Value> {
        let args = parse(flags);
        let mut workload = Workload::new(&args, "m").expect("a workload");
        (0..count).map(|_| serde_json::from_slice(&workload.body()).expect("JSON")).collect()
    }

    fn ids(body: &Value) -> Vec<u64> {
        body["prompt"].as_array().expect("token ids").iter().map(|id| id.as_u64().expect("an id")).collect()
    }

    #[test]
    fn arrivals_keep_the_rate_and_depend_on_the_seed_alone() {
        let times = arrivals(20_000, 50.0, 7);
        assert_eq!(times[0], Duration::ZERO);
        assert!(times.is_sorted());
        let seconds = times[19_999].as_secs_f64();
        assert!((380.0..420.0).contains(&seconds), "20,000 arrivals at 50 a second took {seconds} s");
        // Of exponential gaps, 1 - 1/e are below the mean; of even gaps, none or all.
        let short = times.windows(2).filter(|pair| (pair[1] - pair[0]).as_secs_f64() < 0.02).count();
        assert!((12_200..13_100).contains(&short), "{short}");
        assert_eq!(times, arrivals(20_000, 50.0, 7));
        assert_ne!(times, arrivals(20_000, 50.0, 8));
        assert!(arrivals(9, f64::INFINITY, 7).iter().all(Duration::is_zero));
    }

    #[test]
    fn random_prompts_keep_to_lengths_vocabulary_and_prefixes() {
        let flags = ["--input-len", "20", "--output-len", "8", "--range-ratio", "0.5", "--vocab-size", "30"];
        let shared = ["--shared-prefix-len", "6", "--num-prefixes", "2"];
        let bodies = bodies(&[&flags[..], &shared].concat(), 200);
        for body in &bodies {
            let ids = ids(body);
            assert!((16..=26).contains(&ids.len()) && ids.iter().all(|&id| id < 30), "{ids:?}");
            assert!((4..=8).contains(&body["max_tokens"].as_u64().expect("a count")), "{body}");
            assert_eq!((&body["ignore_eos"], &body["model"]), (&json!(true), &json!("m")));
        }
        for length in [16, 26] {
            assert!(bodies.iter().any(|body| ids(body).len() == length), "no prompt of {length}");
        }
        let prefix = |at: usize| ids(&bodies[at])[..6].to_vec();
        assert_eq!((prefix(0), prefix(1)), (prefix(2), prefix(3)));
        assert_ne!(prefix(0), prefix(1));
        assert_ne!(ids(&bodies[0]), ids(&bodies[2]));
    }

    #[test]
    fn chats_are_words_and_datasets_are_repeated() {
        let chat = &bodies(&["--endpoint", "chat", "--input-len", "9", "--ignore-eos", "false"], 1)[0];
        let content = chat["messages"][0]["content"].as_str().expect("text");
        assert_eq!(content.split(' ').count(), 9);
        assert!(chat.get("ignore_eos").is_none() && chat.get("prompt").is_none());
        let path = std::env::temp_dir().join(format!("bcg-dataset-{}.jsonl", std::process::id()));
        fs::write(&path, "{\"prompt\": \"a\"}\n\n{\"question\": \"b\", \"answer\": 3}\n").expect("writable");
        let file = path.to_str().expect("UTF-8");
        let texts: Vec<Value> = bodies(&["--dataset", file], 3).iter().map(|body| body["prompt"].clone()).collect();
        assert_eq!(texts, ["a", "b", "a"]);
        fs::write(&path, "{\"prompt\": \"a\"}\n{\"prompt\": 3}\n").expect("writable");
        let error = read_dataset(&path).expect_err("line 2 has no text").to_string();
        fs::remove_file(&path).expect("it is there");
        assert!(error.contains("line 2"), "{error}");
    }
}
