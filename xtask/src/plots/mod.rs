//! Pictures of what `bcg bench` measured: JSON in, SVG out.
//!
//! `cargo xtask plots DIR` reads every report in DIR and writes one picture for each model and bench into docs/plots.

mod bars;
mod lines;
mod svg;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::process::root;
use bars::Bar;
use lines::{LineChart, Series};

/// What SGLang took, for the pictures of forwards.
const SGLANG: &str = "benches/peers/sglang.json";

/// Runs `cargo xtask plots DIR`.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let [folder] = args else { bail!("plots wants one folder, with the JSON files that `bcg bench … --json` wrote") };
    let sglang = read(&root().join(SGLANG))?;
    let mut reports = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {folder}"))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    for path in paths {
        let report = read(&path)?;
        if report["rows"].is_array() {
            reports.push(report);
        }
    }
    let pictures = pictures(&reports, &sglang);
    ensure!(!pictures.is_empty(), "{folder} holds no report of `bcg bench prefill`, `decode` or `kernels`");
    let plots = root().join("docs").join("plots");
    fs::create_dir_all(&plots)?;
    for (name, text) in pictures {
        fs::write(plots.join(&name), text)?;
        println!("docs/plots/{name}");
    }
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
}

/// Returns the file name and the text of each picture.
fn pictures(reports: &[Value], sglang: &Value) -> Vec<(String, String)> {
    let mut pictures = Vec::new();
    for report in reports {
        for (bench, size, axis) in
            [("prefill", "tokens", "new tokens of one request"), ("decode", "batch", "sequences in the batch")]
        {
            for model in models(report, bench) {
                let (own, peer) = (Rows::of(report, bench, &model), Rows::of(sglang, bench, &model));
                let profile = Rows::of(report, "profile", &model);
                let chart = LineChart {
                    title: format!("{model}: {bench} forward"),
                    subtitle: subtitle(report),
                    x: axis,
                    y: "wall time, ms",
                    series: vec![
                        Series::line("bcg, graphs", own.points(size, "graph_ms_p50")),
                        Series::line("bcg, graphs, to the token", own.points(size, "step_ms_p50")),
                        Series::line("bcg, eager", own.points(size, "eager_ms_p50")),
                        Series::line("bcg, kernels alone", profile.points(size, "busy_ms")),
                        Series::dots("SGLang, graphs", peer.points(size, "graph_ms")),
                        Series::dots("SGLang, eager", peer.points(size, "eager_ms")),
                        Series::dots("SGLang, full graph", peer.points(size, "full_graph_ms")),
                    ],
                };
                pictures.push((format!("{bench}-{model}.svg"), chart.draw()));
            }
        }
        for model in models(report, "kernels") {
            let bars = Rows::of(report, "kernels", &model).0.into_iter().filter_map(bar).collect::<Vec<_>>();
            let title = format!("{model}: kernels, percent of the machine's ceiling");
            pictures.push((format!("kernels-{model}.svg"), bars::draw(&title, &subtitle(report), &bars)));
        }
    }
    pictures
}

fn subtitle(report: &Value) -> String {
    let known = |key: &str| report["environment"][key].as_str().unwrap_or("unknown").to_owned();
    format!("{}, driver {}, commit {}, {}", known("device"), known("driver"), known("commit"), known("date"))
}

fn models(report: &Value, table: &str) -> BTreeSet<String> {
    let rows = report["rows"].as_array().into_iter().flatten().filter(|row| row["name"] == table);
    rows.filter_map(|row| row["model"].as_str().map(str::to_owned)).collect()
}

/// The rows of one table and model.
struct Rows<'a>(Vec<&'a Value>);

impl<'a> Rows<'a> {
    fn of(report: &'a Value, table: &str, model: &str) -> Self {
        let rows = report["rows"].as_array().into_iter().flatten();
        Self(rows.filter(|row| row["name"] == table && row["model"] == model).collect())
    }

    /// Points with both coordinates, from left to right.
    fn points(&self, x: &str, y: &str) -> Vec<(f64, f64)> {
        let point = |row: &&Value| Some((row[x].as_f64()?, row[y].as_f64()?));
        let mut points: Vec<_> = self.0.iter().filter_map(point).filter(|(x, y)| *x > 0.0 && *y > 0.0).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    }
}

fn bar(row: &Value) -> Option<Bar> {
    let percent = row["percent"].as_f64()?;
    Some(Bar {
        group: row["op"].as_str()?.to_owned(),
        label: row["shape"].as_str()?.to_owned(),
        own: percent,
        peer: row["peer_ratio"].as_f64().filter(|ratio| *ratio > 0.0).map(|ratio| percent / ratio),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn environment() -> Value {
        json!({ "device": "cuda:0 <H200> & \"more\"", "driver": "580", "commit": "abc", "date": "2026-11-21" })
    }

    fn forwards() -> Value {
        let row = |tokens: usize, ms: f64| json!({"name": "prefill", "model": "m-8b", "tokens": tokens, "graph_ms_p50": ms, "step_ms_p50": 1.1 * ms, "eager_ms_p50": 2.0 * ms});
        let profile = json!({"name": "profile", "model": "m-8b", "tokens": 16, "busy_ms": 4.5});
        json!({ "environment": environment(), "rows": [row(16, 5.0), row(1, 4.0), row(8192, 100.0), profile] })
    }

    fn sglang() -> Value {
        json!({ "rows": [{"name": "prefill", "model": "m-8b", "tokens": 16, "graph_ms": 11.5, "full_graph_ms": null}] })
    }

    /// The texts of a picture, which must be well-formed XML.
    fn texts(svg: &str) -> Vec<String> {
        let document = roxmltree::Document::parse(svg).expect("well-formed XML");
        assert_eq!(document.root_element().tag_name().name(), "svg");
        let texts = document.descendants().filter(|node| node.has_tag_name("text"));
        texts.filter_map(|node| node.text().map(str::to_owned)).collect()
    }

    fn count(svg: &str, tag: &str, class: &str) -> usize {
        let document = roxmltree::Document::parse(svg).expect("well-formed XML");
        document.descendants().filter(|node| node.has_tag_name(tag) && node.attribute("class") == Some(class)).count()
    }

    #[test]
    fn a_picture_of_forwards_holds_each_series_that_has_points() {
        let pictures = pictures(&[forwards()], &sglang());
        let [(name, svg)] = &pictures[..] else { panic!("{} pictures", pictures.len()) };
        assert_eq!(name, "prefill-m-8b.svg");
        let texts = texts(svg);
        for wanted in [
            "bcg, graphs",
            "bcg, graphs, to the token",
            "bcg, eager",
            "bcg, kernels alone",
            "SGLang, graphs",
            "wall time, ms",
            "8192",
        ] {
            assert!(texts.iter().any(|text| text == wanted), "{wanted}: {texts:?}");
        }
        assert!(!texts.iter().any(|text| text.contains("full graph")), "{texts:?}");
        assert!(texts.iter().any(|text| text.contains("<H200> & \"more\"")), "{texts:?}");
        // Three points on each of three lines, one of the profile, one of SGLang; the legend has its own.
        assert_eq!((count(svg, "polyline", "series"), count(svg, "circle", "point")), (4, 11));
    }

    #[test]
    fn a_picture_of_kernels_holds_a_bar_for_each_and_its_peer() {
        let row = |shape: &str, ratio: Value| json!({"name": "kernels", "model": "m", "op": "rms_norm", "shape": shape, "percent": 80.0, "peer_ratio": ratio});
        let rows = json!([row("T=1", json!(2.0)), row("T=16", Value::Null)]);
        let pictures = pictures(&[json!({ "environment": environment(), "rows": rows })], &json!({}));
        let [(name, svg)] = &pictures[..] else { panic!("{} pictures", pictures.len()) };
        assert_eq!(name, "kernels-m.svg");
        assert_eq!((count(svg, "rect", "own"), count(svg, "rect", "peer")), (2, 1));
        let texts = texts(svg);
        assert!(["rms_norm", "T=1", "T=16", "80", "40"].iter().all(|wanted| texts.iter().any(|text| text == wanted)));
    }

    #[test]
    fn the_times_of_sglang_can_be_read() {
        let sglang = read(&root().join(SGLANG)).expect("the file");
        for model in ["qwen3-8b", "qwen3-0.6b"] {
            assert_eq!(Rows::of(&sglang, "prefill", model).points("tokens", "graph_ms").len(), 6);
            assert_eq!(Rows::of(&sglang, "decode", model).points("batch", "graph_ms").len(), 4);
        }
    }
}
