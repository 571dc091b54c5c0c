//! Where a figure comes from, and how it is written: a table for people, JSON for programs, both from the same rows.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::timing::Samples;

/// What a figure means nothing without.
#[derive(Clone, Debug)]
pub struct Environment {
    commit: String,
    device: String,
    driver: String,
    date: String,
    command: String,
}

impl Environment {
    /// Looks at this machine; `device` is the runtime's name for the device under test.
    pub fn read(device: &str) -> Self {
        let known = |line: Option<String>| line.unwrap_or_else(|| "unknown".to_owned());
        Self {
            commit: known(commit()),
            device: device.to_owned(),
            driver: driver().unwrap_or_else(|| "none".to_owned()),
            date: known(first_line(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M:%S UTC"]))),
            command: command_line(std::env::args()),
        }
    }

    /// Returns one line for the head of a table.
    pub fn line(&self) -> String {
        format!("device {}, driver {}, commit {}, {}", self.device, self.driver, self.commit, self.date)
    }

    fn json(&self) -> Value {
        let Self { commit, device, driver, date, command } = self;
        json!({ "commit": commit, "device": device, "driver": driver, "date": date, "command": command })
    }
}

/// Reads the file that the GPU bundle carries, else asks git.
fn commit() -> Option<String> {
    let exe = std::env::current_exe().ok()?;
    let carried = exe.parent().and_then(Path::parent).map(|folder| folder.join("COMMIT"));
    if let Some(text) = carried.and_then(|path| fs::read_to_string(path).ok()) {
        return Some(text.trim().to_owned());
    }
    first_line(Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=12"]))
}

/// Joins the words of a command line, but for keys, because reports are passed on.
fn command_line(words: impl Iterator<Item = String>) -> String {
    const KEY: &str = "--api-key";
    let mut line: Vec<String> = Vec::new();
    for word in words {
        let follows_key = line.last().is_some_and(|last| last == KEY);
        line.push(match word.strip_prefix(KEY) {
            _ if follows_key => "***".to_owned(),
            Some(value) if value.starts_with('=') => format!("{KEY}=***"),
            _ => word,
        });
    }
    line.join(" ")
}

fn driver() -> Option<String> {
    first_line(Command::new("nvidia-smi").args(["--query-gpu=driver_version", "--format=csv,noheader"]))
}

fn first_line(command: &mut Command) -> Option<String> {
    let output = command.stderr(std::process::Stdio::null()).output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()?.lines().next().map(|line| line.trim().to_owned())
}

/// One figure of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// Words.
    Text(String),
    /// A count; exact.
    Count(usize),
    /// A measured or derived number.
    Number(f64),
    /// Measured values: median, p10 and p90 are shown.
    Spread(Samples),
    /// Not measured here.
    Missing,
}

impl Cell {
    /// Makes a [`Cell::Number`], or a [`Cell::Missing`].
    pub fn maybe(number: Option<f64>) -> Self {
        number.map_or(Self::Missing, Self::Number)
    }

    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Count(count) => count.to_string(),
            Self::Number(number) => short(*number),
            Self::Spread(samples) => {
                let [p10, p50, p90] = [10, 50, 90].map(|percent| short(samples.percentile(percent)));
                format!("{p50} ({p10}..{p90})")
            }
            Self::Missing => "-".to_owned(),
        }
    }

    fn insert(&self, name: &str, into: &mut Map<String, Value>) {
        match self {
            Self::Text(text) => drop(into.insert(name.to_owned(), json!(text))),
            Self::Count(count) => drop(into.insert(name.to_owned(), json!(count))),
            Self::Number(number) => drop(into.insert(name.to_owned(), json!(number))),
            Self::Missing => drop(into.insert(name.to_owned(), Value::Null)),
            Self::Spread(samples) => {
                for percent in [10, 50, 90] {
                    into.insert(format!("{name}_p{percent}"), json!(samples.percentile(percent)));
                }
            }
        }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<usize> for Cell {
    fn from(count: usize) -> Self {
        Self::Count(count)
    }
}

impl From<f64> for Cell {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<Samples> for Cell {
    fn from(samples: Samples) -> Self {
        Self::Spread(samples)
    }
}

/// Four significant digits, without an exponent.
fn short(number: f64) -> String {
    let digits = match number.abs() {
        size if size >= 1000.0 => 0,
        size if size >= 100.0 => 1,
        size if size >= 10.0 => 2,
        _ => 3,
    };
    format!("{number:.digits$}")
}

/// Named columns of one row. A column's name ends with its unit.
pub type Row = Vec<(&'static str, Cell)>;

/// Rows in named tables, with the environment that they were measured in.
#[derive(Debug)]
pub struct Report {
    environment: Environment,
    notes: Vec<String>,
    rows: Vec<(&'static str, Row)>,
    attached: Map<String, Value>,
    failure: Option<String>,
}

impl Report {
    /// Begins an empty report.
    pub fn new(environment: Environment) -> Self {
        Self { environment, notes: Vec::new(), rows: Vec::new(), attached: Map::new(), failure: None }
    }

    /// Says something about the figures: what they include, under which conditions they hold.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Adds a row to a table; rows of one table have the same columns.
    pub fn row(&mut self, table: &'static str, row: Row) {
        self.rows.push((table, row));
    }

    /// Adds something to the JSON that no table shows.
    pub fn attach(&mut self, name: &str, value: Value) {
        self.attached.insert(name.to_owned(), value);
    }

    /// Says why the figures are not those of a good run; it becomes the error of [`Report::publish`].
    pub fn fail(&mut self, why: String) {
        self.failure = Some(why);
    }

    /// Returns the environment, the notes and all tables, as text.
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.environment.line());
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        let mut tables: Vec<&str> = Vec::new();
        for (table, _) in &self.rows {
            if !tables.contains(table) {
                tables.push(table);
                let rows: Vec<&Row> = self.rows.iter().filter_map(|(of, row)| (of == table).then_some(row)).collect();
                let _ = write!(text, "\n{table}\n{}", aligned(&rows));
            }
        }
        text
    }

    /// Returns the report as JSON: one object for each row, with its table's name.
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|(table, row)| {
                let mut object = Map::new();
                object.insert("name".to_owned(), json!(table));
                row.iter().for_each(|(name, cell)| cell.insert(name, &mut object));
                Value::Object(object)
            })
            .collect();
        let mut json = json!({ "environment": self.environment.json(), "notes": self.notes, "rows": rows });
        for (name, value) in &self.attached {
            json[name] = value.clone();
        }
        json
    }

    /// Prints the text, and writes the JSON if a path is given.
    ///
    /// # Errors
    /// The file system's; what [`Report::fail`] was told, once all is written.
    pub fn publish(&self, path: Option<&Path>) -> Result<()> {
        print!("{}", self.text());
        if let Some(path) = path {
            let json = format!("{:#}\n", self.json());
            fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
        }
        match &self.failure {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }
}

/// Numbers to the right, words to the left.
fn aligned(rows: &[&Row]) -> String {
    let header: Vec<String> = rows[0].iter().map(|(name, _)| (*name).to_owned()).collect();
    let is_text: Vec<bool> = rows[0].iter().map(|(_, cell)| matches!(cell, Cell::Text(_))).collect();
    let mut lines = vec![header];
    lines.extend(rows.iter().map(|row| row.iter().map(|(_, cell)| cell.text()).collect()));
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..is_text.len()).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        let mut padded = String::new();
        for ((cell, &width), &is_text) in line.iter().zip(&widths).zip(&is_text) {
            let _ = if is_text { write!(padded, "{cell:<width$}  ") } else { write!(padded, "{cell:>width$}  ") };
        }
        text += padded.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_carries_its_environment_and_three_percentiles_of_each_spread() {
        let mut report = Report::new(Environment::read("host:0"));
        report.note("host time");
        let times = Samples::new(vec![1.0, 2.0, 3.0]);
        report.row("replay", vec![("breaks", 4.into()), ("chain_us", times.into()), ("raw_us", Cell::Missing)]);
        let path = std::env::temp_dir().join(format!("bcg-report-{}.json", std::process::id()));
        report.publish(Some(&path)).unwrap();
        let read: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        fs::remove_file(path).unwrap();
        assert_eq!(read["environment"]["device"], "host:0");
        assert_eq!(read["notes"][0], "host time");
        assert_eq!((&read["rows"][0]["name"], &read["rows"][0]["breaks"]), (&json!("replay"), &json!(4)));
        assert_eq!(read["rows"][0]["chain_us_p50"], 2.0);
        assert!(read["rows"][0]["raw_us"].is_null());
    }

    #[test]
    fn a_command_line_keeps_its_keys() {
        let words = ["bcg", "--api-key", "a", "--api-key=b", "--json", "c"].map(str::to_owned);
        assert_eq!(command_line(words.into_iter()), "bcg --api-key *** --api-key=*** --json c");
    }

    #[test]
    fn a_table_has_one_header_and_aligned_columns() {
        let mut report = Report::new(Environment::read("host:0"));
        for (op, us) in [("rms_norm", 1.5), ("linear", 12_345.6)] {
            report.row("ops", vec![("op", op.into()), ("us", us.into())]);
        }
        let text = report.text();
        assert!(text.ends_with("\nops\nop           us\nrms_norm  1.500\nlinear    12346\n"), "{text}");
    }
}
