#!/usr/bin/env python3
"""Merges what the steps of `run.sh standing` wrote into one file of standing figures.

    standing.py FOLDER OUT

FOLDER holds the reports of `bcg bench … --json` and `mechanism --json`, whose names begin with the step's kind
(`prefill-…`, `kernels-…`), and `ready-MODEL.txt` with the seconds of each start. OUT gets one row for each figure:
name, unit, median, p10, p90, and the ceilings whose speed it follows. `cargo xtask figures` reads that file. Needs
nothing but Python's own library.
"""

import json
import math
import pathlib
import sys

DEVICE = ["copy", "product"]
HOST = ["driver calls"]

# The kind of each step, and the figures that a complete run has of it.
KINDS = {
    "prefill": ["prefill"],
    "decode": ["decode"],
    "replay": ["healed", "mixed", "chain", "step"],
    "capture": ["capture"],
    "ready": ["ready"],
    "first": ["first-token"],
    "burst": ["burst"],
    "kernels": ["kernel"],
    "mechanism": [],
}

# The ops of the kernel rows, each with the shape where several were timed, and the ceilings that bound it.
KERNELS = {
    "attention_prefill": ("", ["product"]),
    "attention_decode": ("", ["copy"]),
    "mla_decode": ("", ["copy"]),
    "ssd_scan": ("", DEVICE),
    "grouped_linear": ("T=256", DEVICE),
    "linear": ("gate_up_proj T=16", ["copy"]),
}


def percentile(values, percent):
    """The value that `percent` of the values do not exceed (nearest rank), as the benches do it."""
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


def short(number):
    """Four significant digits."""
    return float(f"{number:.4g}")


def figure(name, unit, spread, follows, **more):
    """A row, from its median, p10 and p90."""
    p50, p10, p90 = (short(number) for number in spread)
    return {"name": name, "unit": unit, "median": p50, "p10": p10, "p90": p90, "follows": follows, **more}


def column(row, name):
    """Median, p10 and p90 of a column, or None where it was not measured."""
    spread = [row.get(f"{name}_p{percent}") for percent in (50, 10, 90)]
    return None if None in spread else spread


def rounds(values):
    """Median, p10 and p90 of measurements that were repeated."""
    return [percentile(values, percent) for percent in (50, 10, 90)]


def rows_of(reports, table):
    """The rows of a table in several reports."""
    return [row for report in reports for row in report["rows"] if row["name"] == table]


def forwards(reports, table, size, time):
    """Wall time of a forward with graphs."""
    return [
        figure(f"{table}/{row['model']}/{row[size]}", "ms", column(row, time), DEVICE)
        for row in rows_of(reports, table)
    ]


def replays(reports):
    """Host time of replays; a column that a bench does not have is no figure."""
    rows = rows_of(reports, "replay")
    largest = max((row["tokens"] for row in rows), default=0)
    figures = []
    for row in rows:
        # The chain and the whole step are there to be compared with, so one size of them is enough.
        wanted = ["healed", "mixed", "chain", "step"] if row["tokens"] == largest else ["healed", "mixed"]
        spreads = {kind: column(row, f"{kind}_us") for kind in wanted}
        figures += [
            figure(f"{kind}/{row['model']}/{row['tokens']}", "µs", spread, HOST)
            for kind, spread in spreads.items()
            if spread
        ]
    return figures


def captures(reports):
    """Time of capturing all sizes, over the rounds."""
    seconds = {}
    for row in rows_of(reports, "capture"):
        seconds.setdefault(row["model"], []).append(row["seconds"])
    return [figure(f"capture/{model}", "s", rounds(values), HOST) for model, values in seconds.items()]


def first_tokens(reports):
    """Time to the first token over HTTP, of one request at a time."""
    figures = []
    for report in filter(is_whole, reports):
        ttft = next(row for row in rows_of([report], "latency") if row["time"] == "ttft")
        name = f"first-token/{model_served(report)}/{report['arguments']['input_len']}"
        figures.append(figure(name, "ms", [ttft["p50_ms"], ttft["p10_ms"], ttft["p90_ms"]], DEVICE + HOST))
    return figures


def bursts(reports):
    """Requests per second of a burst, over the rounds."""
    rates = {}
    for report in filter(is_whole, reports):
        arguments = report["arguments"]
        burst = f"{arguments['num_prompts']}x{arguments['input_len']}+{arguments['output_len']}"
        rate = rows_of([report], "throughput")[0]["requests_per_s"]
        rates.setdefault(f"burst/{model_served(report)}/{burst}", []).append(rate)
    return [figure(name, "requests/s", rounds(values), DEVICE + HOST) for name, values in rates.items()]


def model_served(report):
    return pathlib.PurePath(report["model"]).name


def is_whole(report):
    """Whether every request of a load was answered; the rate of those that were says little otherwise."""
    return rows_of([report], "throughput")[0]["errors"] == 0


def kernels(reports):
    """Device time of one launch of the ops, with how close it comes to the ceilings of its own process."""
    figures = []
    for row in rows_of(reports, "kernels"):
        shape, follows = KERNELS.get(row["op"], (None, None))
        if follows and row["shape"].startswith(shape):
            name = f"kernel/{row['op']}/{row['model']}/{row['shape'].replace(' ', '-')}"
            figures.append(figure(name, "µs", column(row, "us"), follows, percent_of_ceiling=short(row["percent"])))
    return figures


def ready(folder):
    """Seconds from the start of a server's process until it answers."""
    figures = []
    for path in sorted(folder.glob("ready-*.txt")):
        seconds = [float(line) for line in path.read_text().split()]
        if seconds:
            figures.append(figure(f"ready/{path.stem.removeprefix('ready-')}", "s", rounds(seconds), HOST))
    return figures


def ceilings(kernel_reports, mechanism_reports):
    """What the machine can do, measured several times in the run; driver calls are bare ones, without the runtime."""
    rows = rows_of(kernel_reports, "ceilings")
    found = []
    for name, unit, key in [("copy", "GB/s", "copy_gb_per_s"), ("product", "TFLOP/s", "product_tflop_per_s")]:
        if rows:
            found.append((name, unit, rounds([row[key] for row in rows])))
    for row in rows_of(mechanism_reports, "replay"):
        spread = column(row, "raw_merged_us")
        if spread:
            found.append(("driver calls", "µs", spread))
    return [
        {"name": name, "unit": unit, "median": short(p50), "p10": short(p10), "p90": short(p90)}
        for name, unit, (p50, p10, p90) in found
    ]


def provenance(reports):
    """Commit, date, device and driver, which all steps of a run share."""
    # A report of the load generator names the server's address in place of a device.
    environments = [report["environment"] for report in reports]
    environments = [environment for environment in environments if not environment["device"].startswith("behind ")]
    if not environments:
        sys.exit("standing.py: no step wrote a report, so there is nothing to merge")
    for key in ["commit", "device", "driver"]:
        values = sorted({environment[key] for environment in environments})
        if len(values) > 1:
            differing = ", ".join(values)
            sys.exit(f"standing.py: the steps differ in their {key} ({differing}); merge the reports of one run only")
    first = min(environments, key=lambda environment: environment["date"])
    return {"commit": first["commit"], "date": first["date"], "gpu": first["device"], "driver": first["driver"]}


def dump(whole):
    """JSON with one row on each line, so that a difference shows which figures changed."""
    lines = []
    for key, value in whole.items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in value)
            lines.append(f"  {json.dumps(key)}: [\n{items}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def table(whole):
    """Lines for people."""
    lines = [f"{whole['gpu']}, driver {whole['driver']}, commit {whole['commit']}, {whole['date']}"]
    for row in whole["ceilings"] + whole["rows"]:
        percent = f", {row['percent_of_ceiling']:.0f} % of its ceiling" if "percent_of_ceiling" in row else ""
        spread = f"({row['p10']:g}..{row['p90']:g}){percent}"
        lines.append(f"{row['name']:<52} {row['median']:>9g} {row['unit']:<10} {spread}")
    return lines


def main():
    folder, out = (pathlib.Path(argument) for argument in sys.argv[1:])
    by_kind = {kind: [] for kind in KINDS}
    # In the order of the steps.
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
        by_kind[path.stem.split("-")[0]].append(json.loads(path.read_text()))
    rows = [
        *forwards(by_kind["prefill"], "prefill", "tokens", "graph_ms"),
        *forwards(by_kind["decode"], "decode", "batch", "step_ms"),
        *replays(by_kind["replay"]),
        *captures(by_kind["capture"]),
        *ready(folder),
        *first_tokens(by_kind["first"]),
        *bursts(by_kind["burst"]),
        *kernels(by_kind["kernels"]),
    ]
    whole = {
        **provenance([report for reports in by_kind.values() for report in reports]),
        "ceilings": ceilings(by_kind["kernels"], by_kind["mechanism"]),
        "rows": rows,
    }
    out.write_text(dump(whole))
    print("\n".join(table(whole)))
    measured = {row["name"].split("/")[0] for row in rows}
    for kind in (kind for kinds in KINDS.values() for kind in kinds if kind not in measured):
        print(f"absent: no figure of {kind} was measured")


if __name__ == "__main__":
    main()
