// The page: what the data say, in tiles, charts and tables.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// --- How things are written ---

const digits = (x) => (x >= 100 ? 0 : x >= 10 ? 1 : 2);
const us = (x) => (x === null || x === undefined ? "–" : x >= 1000 ? `${(x / 1000).toFixed(digits(x / 1000))} ms` : `${x.toFixed(digits(x))} µs`);
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (n >= 1024 && unit < 3) [n, unit] = [n / 1024, unit + 1];
  return `${unit ? n.toFixed(digits(n)) : n} ${units[unit]}`;
}
/** Writes a fact by its key: bytes, microseconds, yes or no, lists. */
function fact(key, value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.join(", ");
  if (typeof value !== "number") return String(value);
  if (key.endsWith("bytes")) return bytes(value);
  return key.endsWith("_us") ? us(value) : value.toLocaleString("en");
}
const facts = ({ columns, rows }, index) => (rows[index] ?? []).map((value, at) => [columns[at].title, fact(columns[at].key, value)]);
const sum = (list) => list.reduce((total, x) => total + x, 0);
const legend = (id, entries) => byId(id).append(...entries.map(([kind, text]) => html("li", {}, html("i", { class: kind }), text)));

const healed = data.steps.filter((step) => step.part.kind === "healed");
/** Breaks without a launch of their own. */
const numHealed = sum(healed.map((step) => step.part.num_segments - 1));
/** Microseconds of the kernels that `belongs` is true of; nothing if there are none. */
function gpuUs(belongs) {
  const kernels = data.kernels.filter(belongs);
  return kernels.length ? sum(kernels.map((kernel) => kernel.duration_us)) : null;
}
const isPart = (part) => (kernel) => kernel.part?.kind === part.kind && kernel.part.index === part.index;

function drawHead() {
  const what = data.phase === "decode" ? `decode of ${count(data.size, "sequence")}` : `prefill of ${count(data.size, "token")}`;
  document.title = `${data.model}, ${what} – bcg inspect`;
  byId("title").textContent = `${data.model} · ${what}`;
  byId("subtitle").textContent = `On ${data.device}. One forward, replayed from a breakable CUDA graph; uploads, logits and sampling are left out.`;
  const { gpu, memory, breaks, segments } = data;
  const tiles = [
    ["Host time", us(data.host_us), "until everything is enqueued"],
    ["Forward", us(data.wall_us), "until the device is done"],
    ["GPU busy", gpu ? gpu.busy_us.map((busy) => `${((100 * busy) / (gpu.span_us || 1)).toFixed(1)} %`).join(" · ") : "–", gpu ? `${gpu.busy_us.map(us).join(" · ")} of ${us(gpu.span_us)}` : "not watched"],
    ["Kernels", gpu ? data.kernels.length.toLocaleString("en") : "–", gpu ? `${us(gpuUs(() => true))} in all` : "not watched"],
    ["Breaks", breaks.rows.length.toLocaleString("en"), healed.length ? `${numHealed} healed into ${count(healed.length, "launch", "launches")}` : "run between launches"],
    ["Segments", segments.rows.length.toLocaleString("en"), `captured in ${data.capture_ms.toFixed(2)} ms`],
    ["Arena", bytes(memory.extent_bytes), `${bytes(memory.peak_bytes)} in use at most`],
  ];
  byId("tiles").append(...tiles.map(([name, value, more]) => html("div", {}, html("dt", {}, name), html("dd", {}, value), html("dd", { class: "sub" }, more))));
}

// --- The timeline ---

const LANE = 40;
const SPACE = 10;

function stepFacts(step, index) {
  const list = [["begins", us(step.begin_us)], ["host", us(step.duration_us)]];
  if (data.gpu) list.push(["host, not watched", us(step.host_us)], ["GPU", us(gpuUs((kernel) => kernel.step === index || isPart(step.part)(kernel)))]);
  const known = { segment: data.segments, break: data.breaks }[step.part.kind];
  if (known) list.push(...facts(known, step.part.index));
  return list;
}

/** Where the GPU of these kernels ran nothing, between its first kernel and its last one. */
function gaps(kernels, y, height, row) {
  const found = [];
  let until = kernels[0]?.begin_us ?? 0;
  for (const kernel of kernels) {
    if (kernel.begin_us - until > 0.2) {
      const title = `gap of ${us(kernel.begin_us - until)}`;
      found.push({ from: until, to: kernel.begin_us, y, height, row, kind: "gap", title, facts: [["begins", us(until)], ["ends with", kernel.name]] });
    }
    until = Math.max(until, kernel.begin_us + kernel.duration_us);
  }
  return found;
}

function drawTimeline() {
  const ranks = [...new Set(data.kernels.map((kernel) => kernel.rank))].sort((a, b) => a - b);
  const ofRank = (rank) => data.kernels.filter((kernel) => kernel.rank === rank);
  const streamsOf = (rank) => [...new Set(ofRank(rank).map((kernel) => kernel.stream))].sort((a, b) => a - b);
  const gpuLanes = ranks.flatMap((rank) => streamsOf(rank).map((stream) => ({ rank, stream })));
  const laneOf = (kernel) => gpuLanes.findIndex((lane) => lane.rank === kernel.rank && lane.stream === kernel.stream);
  const laneName = ({ rank, stream }) => (ranks.length > 1 ? `Rank ${rank}, stream ${stream}` : `GPU stream ${stream}`);
  const top = (row) => SPACE + row * (LANE + SPACE);
  const lanes = ["Host", ...gpuLanes.map(laneName)].map((text, row) => ({ text, y: top(row), height: LANE }));
  const steps = data.steps.map((step, index) => ({
    from: step.begin_us, to: step.begin_us + step.duration_us, y: top(0), height: LANE, row: 0,
    kind: step.part.kind, shape: "step", groups: [index, step.part.label], text: step.part.label, title: step.part.label, facts: stepFacts(step, index),
  }));
  const kernels = data.kernels.map((kernel) => {
    const row = 1 + laneOf(kernel);
    const step = data.steps[kernel.step];
    const list = [["begins", us(kernel.begin_us)], ["runs", us(kernel.duration_us)], ["stream", String(kernel.stream)]];
    if (ranks.length > 1) list.push(["rank", String(kernel.rank)]);
    if (kernel.wait_us !== null) list.push(["waited for another rank", us(kernel.wait_us)]);
    if (kernel.part) list.push(["part of", kernel.part.label]);
    if (step) list.push(["launched by", step.part.label], ["after that began", us(kernel.begin_us - step.begin_us)]);
    return {
      from: kernel.begin_us, to: kernel.begin_us + kernel.duration_us, y: top(row), height: LANE, row,
      kind: (kernel.part ?? step?.part)?.kind ?? "segment", shape: "kernel", groups: [kernel.step, kernel.part?.label], text: kernel.name, title: kernel.name, facts: list,
    };
  });
  const idle = ranks.flatMap((rank) => {
    const [first, num] = [gpuLanes.findIndex((lane) => lane.rank === rank), streamsOf(rank).length];
    return gaps(ofRank(rank), top(1 + first), num * (LANE + SPACE) - SPACE, 1 + gpuLanes.length + rank);
  });
  const items = [...idle, ...steps, ...kernels];
  const end = Math.max(...items.map((item) => item.to), 1);
  const kinds = [["segment", "segment"], ["break", "break"], ...(healed.length ? [["healed", "healed launch"]] : []), ...(data.gpu ? [["gap", "GPU idle"]] : [])];
  legend("timeline-legend", kinds);
  byId("timeline-note").textContent = data.gpu
    ? `Drawn: a replay that CUPTI watched, which slows the host to ${us(Math.max(...steps.map((step) => step.to), 0))}. The figures above are of a replay that nothing watched.`
    : `Host times only: ${data.no_gpu}.`;
  return new Chart(byId("timeline"), {
    label: "Timeline", begin: 0, end: end * 1.01, spanMin: 0.5, height: top(lanes.length), lanes, items,
    tick: (at, step) => (step >= 1000 ? `${at / 1000} ms` : `${Number(at.toPrecision(12))} µs`), buttons: byId("timeline-buttons"),
  });
}

// --- The tables ---

/** Makes a table of facts, with a button that shows the step in the timeline, and with its times. */
function table(kind, { columns, rows }, timeline) {
  const isNumber = columns.map((_, at) => rows.some((row) => typeof row[at] === "number"));
  const cell = (tag, number, text) => html(tag, { class: number ? "number" : text.length > 60 ? "words" : "" }, text);
  const times = data.gpu ? ["host", "GPU"] : ["host"];
  const heads = [cell("th", true, "#"), ...times.map((text) => cell("th", true, text)), ...columns.map((column, at) => cell("th", isNumber[at], column.title))];
  const body = rows.map((row, index) => {
    const at = data.steps.findIndex(({ part }) => part.kind === kind && part.index === index);
    const step = data.steps[at];
    const name = html("td", { class: "number" }, String(index));
    if (step) {
      const button = html("button", { type: "button", "aria-label": `Show ${step.part.label} in the timeline` }, String(index));
      button.addEventListener("click", () => {
        const item = timeline.items.find((candidate) => candidate.shape === "step" && candidate.groups[0] === at);
        timeline.svg.scrollIntoView({ block: "center" });
        timeline.svg.focus({ preventScroll: true });
        timeline.zoomTo(item);
        timeline.choose(item);
      });
      name.replaceChildren(button);
    }
    const spent = [us(step?.host_us ?? step?.duration_us), us(gpuUs(isPart({ kind, index })))].slice(0, times.length);
    return html("tr", {}, name, ...spent.map((text) => cell("td", true, text)), ...row.map((value, col) => cell("td", isNumber[col], fact(columns[col].key, value))));
  });
  return html("table", {}, html("thead", {}, html("tr", {}, ...heads)), html("tbody", {}, ...body));
}

function drawTables(timeline) {
  byId("breaks").append(data.breaks.rows.length ? table("break", data.breaks, timeline) : html("p", { class: "muted" }, "No breaks: the whole forward is one segment."));
  byId("segments").append(table("segment", data.segments, timeline));
}

// --- The memory ---

/** The graph's steps in order: each segment, and after it the breaks that it ends with. */
function graphSteps() {
  const list = [];
  data.segments.rows.forEach((_, segment) => {
    list.push({ kind: "segment", label: `segment ${segment}` });
    data.after_segment.forEach((after, index) => {
      if (after === segment) list.push({ kind: "break", label: `break ${index}: ${data.breaks.rows[index][0]}` });
    });
  });
  return list;
}

function drawMemory() {
  const { blocks, usage, extent_bytes: extent, peak_bytes: peak } = data.memory;
  const [usageHeight, height] = [64, 300];
  const top = SPACE + usageHeight + SPACE;
  const steps = graphSteps();
  const labelAt = (at) => steps[Math.min(Math.floor(at), steps.length - 1)]?.label ?? "–";
  const scale = height / (extent || 1);
  const items = blocks.map((block, index) => ({
    from: block.from, to: block.to, y: top + height - (block.offset + block.bytes) * scale, height: Math.max(block.bytes * scale, 1), row: block.offset,
    kind: steps[Math.floor(block.from)]?.kind ?? "segment", shape: "block", title: `block ${index} of ${bytes(block.bytes)}`,
    facts: [["taken in", labelAt(block.from)], ["held to", block.to >= steps.length ? "the end: it is in the output" : labelAt(block.to)], ["address", `arena + ${block.offset.toLocaleString("en")}`], ["bytes", block.bytes.toLocaleString("en")]],
  }));
  legend("memory-legend", [["segment", "taken by a segment"], ["break", "taken by a break"]]);
  byId("memory-note").textContent = `${count(blocks.length, "block")} of the arena along the steps of the forward: a block's height is its size, its place its address. Above, the bytes in use, at most ${bytes(peak)} of the ${bytes(extent)} that the graph takes. Weights, KV cache and inputs lie elsewhere.`;
  const bands = steps.flatMap((step, index) => (step.kind === "break" ? [{ from: index, to: index + 1 }] : []));
  return new Chart(byId("memory"), {
    label: "Memory", begin: 0, end: Math.max(steps.length, 1), spanMin: 0.25, height: top + height + SPACE, items, bands,
    lanes: [{ text: "Bytes in use", y: SPACE, height: usageHeight }, { text: "Address", y: top, height }],
    area: { y: SPACE, height: usageHeight, max: peak, points: usage }, tickMin: 1,
    tick: (at) => (at < steps.length ? labelAt(at).replace(/:.*/, "") : ""), buttons: byId("memory-buttons"),
  });
}

drawHead();
const timeline = drawTimeline();
drawTables(timeline);
drawMemory();
