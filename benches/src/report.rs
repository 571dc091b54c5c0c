//! Where a figure comes from, and how it is written: a table for people, JSON for programs.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::timing::Samples;

/// What a figure means nothing without.
#[derive(Clone, Debug)]
pub struct Environment {
    commit: String,
    device: String,
    driver: String,
    command: String,
}

impl Environment {
    /// Looks at this machine; `device` is the runtime's name for the device under test.
    pub fn read(device: &str) -> Self {
        let command: Vec<String> = std::env::args().collect();
        Self {
            commit: commit().unwrap_or_else(|| "unknown".to_owned()),
            device: device.to_owned(),
            driver: driver().unwrap_or_else(|| "none".to_owned()),
            command: command.join(" "),
        }
    }

    /// Returns one line for the head of a table.
    pub fn line(&self) -> String {
        format!("device {}, driver {}, commit {}", self.device, self.driver, self.commit)
    }

    fn json(&self) -> Value {
        json!({ "commit": self.commit, "device": self.device, "driver": self.driver, "command": self.command })
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

fn driver() -> Option<String> {
    first_line(Command::new("nvidia-smi").args(["--query-gpu=driver_version", "--format=csv,noheader"]))
}

fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()?.lines().next().map(|line| line.trim().to_owned())
}

/// Rows of named numbers, collected for one JSON file.
#[derive(Debug)]
pub struct Report {
    environment: Environment,
    rows: Vec<Value>,
}

impl Report {
    /// Begins an empty report.
    pub fn new(environment: Environment) -> Self {
        Self { environment, rows: Vec::new() }
    }

    /// Adds a row: its name, its parameter, and the p10, median and p90 of each column.
    pub fn row(&mut self, name: &str, parameter: (&str, usize), columns: &[(&str, &Samples)]) {
        let mut row = Map::new();
        row.insert("name".to_owned(), json!(name));
        row.insert(parameter.0.to_owned(), json!(parameter.1));
        for (column, samples) in columns {
            for percent in [10, 50, 90] {
                row.insert(format!("{column}_p{percent}"), json!(samples.percentile(percent)));
            }
        }
        self.rows.push(Value::Object(row));
    }

    /// Writes the report as JSON.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, path: &Path) -> Result<()> {
        let report = json!({ "environment": self.environment.json(), "rows": self.rows });
        fs::write(path, format!("{report:#}\n")).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_carries_its_environment_and_three_percentiles_of_each_column() {
        let mut report = Report::new(Environment::read("host:0"));
        report.row("replay", ("breaks", 4), &[("chain_us", &Samples::new(vec![1.0, 2.0, 3.0]))]);
        let path = std::env::temp_dir().join(format!("bcg-report-{}.json", std::process::id()));
        report.write(&path).unwrap();
        let read: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        fs::remove_file(path).unwrap();
        assert_eq!(read["environment"]["device"], "host:0");
        assert_eq!(read["rows"][0]["breaks"], 4);
        assert_eq!(read["rows"][0]["chain_us_p50"], 2.0);
    }
}
