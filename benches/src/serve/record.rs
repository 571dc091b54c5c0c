//! What one request took, and what all of them say together.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::report::{Cell, Report, Row};
use super::super::timing::Samples;

/// Distinct errors that are shown.
const ERRORS_MAX: usize = 5;

/// The times of one request, from the moment it was sent.
#[derive(Debug, Clone, Default)]
pub(super) struct Record {
    /// When it was sent, from the beginning of the run.
    pub(super) start: Duration,
    /// Until the first part of the answer.
    pub(super) ttft: Option<Duration>,
    /// Between one part of the answer and the next.
    pub(super) itl: Vec<Duration>,
    /// Until the latest part of the answer.
    pub(super) latest: Duration,
    /// Until the end of the answer, good or bad.
    pub(super) e2e: Duration,
    /// As the server counts them; 0 if it does not say.
    pub(super) input_tokens: usize,
    /// As the server counts them, if it does.
    pub(super) output_tokens: Option<usize>,
    /// Why there is no whole answer.
    pub(super) error: Option<String>,
}

impl Record {
    /// Notes that a part of the answer came.
    pub(super) fn chunk(&mut self, at: Duration) {
        match self.ttft {
            None => self.ttft = Some(at),
            Some(_) => self.itl.push(at - self.latest),
        }
        self.latest = at;
    }

    /// Returns how many parts came.
    pub(super) fn num_chunks(&self) -> usize {
        self.itl.len() + usize::from(self.ttft.is_some())
    }

    /// Returns the tokens of the answer; where the server does not count them, each part is one.
    fn output_tokens(&self) -> usize {
        self.output_tokens.unwrap_or_else(|| self.num_chunks())
    }

    /// Returns the time of each token but the first.
    fn tpot(&self) -> Option<f64> {
        let tokens = self.output_tokens();
        (tokens > 1).then(|| Some(ms(self.latest - self.ttft?) / (tokens - 1) as f64))?
    }

    /// Returns everything that was noted.
    pub(super) fn json(&self) -> Value {
        json!({
            "start_ms": ms(self.start),
            "ttft_ms": self.ttft.map(ms),
            "itl_ms": self.itl.iter().copied().map(ms).collect::<Vec<_>>(),
            "tpot_ms": self.tpot(),
            "e2e_ms": ms(self.e2e),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens(),
            "error": self.error,
        })
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Writes the tables of a run.
pub(super) fn summarise(records: &[Record], report: &mut Report) {
    let good: Vec<&Record> = records.iter().filter(|record| record.error.is_none()).collect();
    let seconds = records.iter().map(|record| record.start + record.e2e).max().unwrap_or_default().as_secs_f64();
    let sum = |tokens: fn(&Record) -> usize| good.iter().copied().map(tokens).sum::<usize>();
    let (input, output) = (sum(|record| record.input_tokens), sum(Record::output_tokens));
    report.row(
        "throughput",
        vec![
            ("requests", records.len().into()),
            ("errors", (records.len() - good.len()).into()),
            ("seconds", seconds.into()),
            ("requests_per_s", (good.len() as f64 / seconds).into()),
            ("input_tokens", input.into()),
            ("output_tokens", output.into()),
            ("input_tokens_per_s", (input as f64 / seconds).into()),
            ("output_tokens_per_s", (output as f64 / seconds).into()),
            ("chunks", sum(Record::num_chunks).into()),
            ("peak_concurrency", peak_concurrency(records).into()),
        ],
    );
    let each = |time: fn(&Record) -> Option<f64>| good.iter().filter_map(|record| time(record)).collect();
    report.row("latency", latency("ttft", each(|record| record.ttft.map(ms))));
    report.row("latency", latency("itl", good.iter().flat_map(|record| &record.itl).copied().map(ms).collect()));
    report.row("latency", latency("tpot", each(Record::tpot)));
    report.row("latency", latency("e2e", each(|record| Some(ms(record.e2e)))));
    let mut errors: BTreeMap<&str, usize> = BTreeMap::new();
    records
        .iter()
        .filter_map(|record| record.error.as_deref())
        .for_each(|error| *errors.entry(error).or_default() += 1);
    let mut errors: Vec<_> = errors.into_iter().collect();
    errors.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    for (error, count) in errors.into_iter().take(ERRORS_MAX) {
        report.row("errors", vec![("requests", count.into()), ("error", error.into())]);
    }
}

fn latency(name: &str, times: Vec<f64>) -> Row {
    let samples = (!times.is_empty()).then(|| Samples::new(times));
    let cell = |figure: &dyn Fn(&Samples) -> f64| Cell::maybe(samples.as_ref().map(figure));
    vec![
        ("time", name.into()),
        ("mean_ms", cell(&Samples::mean)),
        ("p10_ms", cell(&|samples| samples.percentile(10))),
        ("p50_ms", cell(&Samples::median)),
        ("p90_ms", cell(&|samples| samples.percentile(90))),
        ("p99_ms", cell(&|samples| samples.percentile(99))),
        ("samples", samples.as_ref().map_or(0, Samples::len).into()),
    ]
}

/// Returns how many requests were on their way at once, at most.
fn peak_concurrency(records: &[Record]) -> usize {
    let ends = records.iter().map(|record| (record.start + record.e2e, false));
    let mut changes: Vec<(Duration, bool)> = records.iter().map(|record| (record.start, true)).chain(ends).collect();
    // Where one ends as another begins, the end comes first.
    changes.sort_unstable();
    let (mut now, mut peak) = (0_usize, 0);
    for (_, begins) in changes {
        now = if begins { now + 1 } else { now.saturating_sub(1) };
        peak = peak.max(now);
    }
    peak
}

#[cfg(test)]
mod tests {
    use super::super::super::report::Environment;
    use super::*;

    fn record(start: u64, chunks: &[u64], e2e: u64) -> Record {
        let millis = Duration::from_millis;
        let mut record = Record { start: millis(start), e2e: millis(e2e), input_tokens: 10, ..Record::default() };
        chunks.iter().for_each(|&at| record.chunk(millis(at)));
        record
    }

    #[test]
    fn a_record_tells_first_token_gaps_and_time_per_token() {
        let mut record = record(0, &[100, 130, 190], 200);
        assert_eq!(record.json()["ttft_ms"], 100.0);
        assert_eq!(record.json()["itl_ms"], json!([30.0, 60.0]));
        assert_eq!((record.json()["tpot_ms"].clone(), record.output_tokens()), (json!(45.0), 3));
        record.output_tokens = Some(7);
        assert_eq!(record.json()["tpot_ms"], 15.0, "the server's count is the true one");
        record.output_tokens = Some(1);
        assert!(record.json()["tpot_ms"].is_null());
    }

    #[test]
    fn concurrency_peaks_where_most_overlap() {
        let times = [(0, 10), (5, 10), (10, 10), (12, 1), (30, 5)];
        let records: Vec<Record> = times.iter().map(|&(start, e2e)| record(start, &[], e2e)).collect();
        assert_eq!(peak_concurrency(&records), 3);
        assert_eq!(peak_concurrency(&records[..1]), 1);
        assert_eq!(peak_concurrency(&[record(0, &[], 10), record(10, &[], 10)]), 1);
    }

    #[test]
    fn a_summary_counts_good_answers_and_names_each_error_once() {
        let mut records = vec![record(0, &[100, 200], 200), record(500, &[300, 500], 500)];
        for error in ["HTTP 429: full", "HTTP 429: full", "reset"] {
            records.push(Record { error: Some(error.to_owned()), ..record(0, &[50], 50) });
        }
        let mut report = Report::new(Environment::read("test"));
        summarise(&records, &mut report);
        let rows = report.json()["rows"].clone();
        let throughput = &rows[0];
        assert_eq!((&throughput["requests"], &throughput["errors"]), (&json!(5), &json!(3)));
        assert_eq!((&throughput["seconds"], &throughput["requests_per_s"]), (&json!(1.0), &json!(2.0)));
        assert_eq!((&throughput["input_tokens"], &throughput["output_tokens"]), (&json!(20), &json!(4)));
        assert_eq!(
            (&rows[1]["time"], &rows[1]["mean_ms"], &rows[1]["p99_ms"]),
            (&json!("ttft"), &json!(200.0), &json!(300.0))
        );
        assert_eq!((&rows[2]["samples"], &rows[2]["p50_ms"]), (&json!(2), &json!(100.0)));
        assert_eq!((&rows[5]["requests"], &rows[5]["error"]), (&json!(2), &json!("HTTP 429: full")));
        assert_eq!(rows[6]["error"], "reset");
    }
}
