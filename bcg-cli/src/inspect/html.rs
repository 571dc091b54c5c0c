//! The timeline of a forward as one page that needs no network: `page.html` with its style, its script and its data.

use bcg_runtime::{StepKind, StepTime};
use serde_json::{Value, json};

use super::memory::Memory;
use super::table::{BREAK_COLUMNS, Column, SEGMENT_COLUMNS};
use super::{Inspected, rounded};

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPTS: [&str; 2] = [include_str!("chart.js"), include_str!("page.js")];

/// Makes the page.
pub(super) fn page(inspected: &Inspected) -> String {
    // The page's parts hold none of the marks but their own; the data, which may, goes in last.
    let parts =
        [("/*STYLE*/", STYLE.to_owned()), ("/*SCRIPT*/", SCRIPTS.concat()), ("\"DATA\"", embed(&data(inspected)))];
    parts.iter().fold(PAGE.to_owned(), |page, (mark, text)| page.replacen(mark, text, 1))
}

/// Writes JSON that no HTML parser takes for the end of its element.
fn embed(data: &Value) -> String {
    data.to_string().replace('<', "\\u003c")
}

/// Names a step for people.
pub(super) fn step_label(inspected: &Inspected, kind: StepKind) -> String {
    match kind {
        StepKind::Segment(index) => format!("segment {index}"),
        StepKind::Break(index) => {
            let name = inspected.description.breaks.get(index).map_or("?", |one| one.name);
            format!("break {index}: {name}")
        }
        StepKind::Healed { first_segment, num_segments } => {
            format!("healed launch: segments {first_segment} to {}", first_segment + num_segments - 1)
        }
    }
}

/// Everything that the page shows.
fn data(inspected: &Inspected) -> Value {
    let Inspected { description, timeline, .. } = inspected;
    let memory = Memory::new(description);
    let blocks = memory.blocks.iter().map(|placed| {
        json!({ "offset": placed.block.offset, "bytes": placed.block.bytes, "from": placed.from, "to": placed.to })
    });
    let gpu = timeline.gpu.as_ref().ok();
    json!({
        "model": inspected.model,
        "device": inspected.device,
        "phase": inspected.phase.name(),
        "size": inspected.size,
        "host_us": rounded(timeline.host_us),
        "wall_us": rounded(timeline.wall_us),
        "capture_ms": description.capture_time.as_secs_f64() * 1e3,
        "gpu": gpu.map(|gpu| {
            let busy_us: Vec<f64> = (0..gpu.num_ranks()).map(|rank| rounded(gpu.busy_us(rank))).collect();
            json!({ "busy_us": busy_us, "span_us": rounded(gpu.span_us()) })
        }),
        "no_gpu": timeline.gpu.as_ref().err(),
        "steps": steps(inspected),
        "kernels": gpu.map_or(&[][..], |gpu| &gpu.kernels).iter().map(|kernel| json!({
            "name": kernel.name,
            "rank": kernel.rank,
            "stream": kernel.stream_id,
            "wait_us": kernel.wait_us.map(rounded),
            "begin_us": rounded(kernel.begin_us),
            "duration_us": rounded(kernel.duration_us),
            "step": kernel.step,
            "part": kernel.part.map(|part| part_json(inspected, part)),
        })).collect::<Vec<_>>(),
        "segments": facts(SEGMENT_COLUMNS, &description.segments),
        "breaks": facts(BREAK_COLUMNS, &description.breaks),
        "after_segment": description.breaks.iter().map(|one| one.after_segment).collect::<Vec<_>>(),
        "memory": {
            "extent_bytes": description.extent_bytes,
            "peak_bytes": memory.peak_bytes(),
            "blocks": blocks.collect::<Vec<_>>(),
            "usage": memory.usage,
        },
    })
}

/// The steps that are drawn, each with its time in the replay that nothing watched.
fn steps(inspected: &Inspected) -> Vec<Value> {
    let unwatched = |at: usize, kind: StepKind| {
        let step = inspected.timeline.steps.get(at).filter(|step| step.kind == kind);
        step.map(|step| step.duration_us)
    };
    let step = |(at, step): (usize, &StepTime)| {
        json!({
            "part": part_json(inspected, step.kind),
            "begin_us": rounded(step.begin_us),
            "duration_us": rounded(step.duration_us),
            "host_us": unwatched(at, step.kind).map(rounded),
        })
    };
    inspected.drawn_steps().iter().enumerate().map(step).collect()
}

/// Names a step, and says which of its kind it is and how many segments it launches.
fn part_json(inspected: &Inspected, kind: StepKind) -> Value {
    let (name, index, num_segments) = match kind {
        StepKind::Segment(index) => ("segment", index, 1),
        StepKind::Break(index) => ("break", index, 0),
        StepKind::Healed { first_segment, num_segments } => ("healed", first_segment, num_segments),
    };
    json!({ "kind": name, "index": index, "num_segments": num_segments, "label": step_label(inspected, kind) })
}

/// What is known of each of `all`, as rows under headings.
fn facts<T>(columns: &[Column<T>], all: &[T]) -> Value {
    let heads: Vec<Value> = columns.iter().map(|(key, title, _)| json!({ "key": key, "title": title })).collect();
    let rows: Vec<Vec<Value>> = all.iter().map(|one| columns.iter().map(|(.., read)| read(one)).collect()).collect();
    json!({ "columns": heads, "rows": rows })
}

#[cfg(test)]
mod tests {
    use super::super::tests::inspected;
    use super::*;

    /// The page's data as a browser reads it.
    fn parsed(page: &str) -> Value {
        let (_, rest) = page.split_once("<script type=\"application/json\" id=\"data\">").expect("the data's element");
        serde_json::from_str(rest.split_once("</script>").expect("its end").0).expect("JSON")
    }

    #[test]
    fn the_page_holds_its_data_and_nothing_in_them_ends_its_element() {
        let page = page(&inspected(true));
        let data = parsed(&page);
        assert_eq!(data["breaks"]["rows"][0][1], "a</script><b>.rs");
        assert_eq!(data["steps"].as_array().map(Vec::len), Some(3));
        assert_eq!(data["kernels"][1]["step"], 1);
        assert_eq!((&data["gpu"]["busy_us"], &data["gpu"]["span_us"]), (&json!([8.0]), &12.0.into()));
        assert_eq!((&data["memory"]["peak_bytes"], &data["no_gpu"]), (&1536.into(), &Value::Null));
    }

    #[test]
    fn a_page_of_the_host_device_says_why_there_are_no_gpu_times() {
        let data = parsed(&page(&inspected(false)));
        assert_eq!((&data["gpu"], &data["kernels"]), (&Value::Null, &json!([])));
        assert_eq!(data["no_gpu"], "host:0 runs no kernel on a GPU");
    }

    #[test]
    fn the_page_loads_nothing_and_leaves_no_mark() {
        let page = page(&inspected(true));
        for load in ["src=", "href=", "@import", "url(", "fetch(", "XMLHttpRequest"] {
            assert!(!page.contains(load), "{load}");
        }
        for mark in ["/*STYLE*/", "/*SCRIPT*/", "\"DATA\""] {
            assert!(!page.contains(mark), "{mark}");
        }
    }
}
