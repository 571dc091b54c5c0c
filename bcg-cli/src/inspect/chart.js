"use strict";
// A chart of rectangles over one axis that zooms: the timeline, and the memory. Text reaches the page as text nodes only.

/** Makes an HTML element; `children` are elements, or text. */
function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Makes an SVG element in `parent`. */
function svg(parent, tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

/** The one tooltip of the page. */
const tip = {
  element: document.getElementById("tip"),

  show(item, x, y) {
    const facts = html("dl");
    for (const [name, value] of item.facts) facts.append(html("dt", {}, name), html("dd", {}, value));
    this.element.replaceChildren(html("strong", {}, item.title), facts);
    this.element.hidden = false;
    const { width, height } = this.element.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? x - 12 - width : x + 16;
    const top = y + 18 + height > innerHeight ? y - 12 - height : y + 18;
    this.element.style.left = `${Math.max(left, 4)}px`;
    this.element.style.top = `${Math.max(top, 4)}px`;
  },

  hide() {
    this.element.hidden = true;
  },
};

/** Pixels left of the plot, for the names of the lanes, and above it, for the ruler. */
const GUTTER = 104;
const RULER = 24;

/**
 * Draws `items` over the axis from `begin` to `end`.
 *
 * An item has `from`, `to`, `y`, `height`, `kind` (its colour), `row` (for the arrow keys), `title`, `facts` (pairs of texts);
 * if it belongs to others `groups` that they share, if it is named in place `text`, a further class `shape`. `lanes` have
 * `text`, `y` and `height`; `bands` have `from` and `to` and stand behind; `area` has `y`, `height`, `max` and `points`. `tick` writes a
 * place of the axis.
 */
class Chart {
  constructor(host, spec) {
    Object.assign(this, { area: null, bands: [], buttons: null }, spec);
    this.view = [this.begin, this.end];
    this.chosen = null;
    const label = `${this.label}. Arrow keys choose, plus and minus zoom, 0 shows all.`;
    this.svg = svg(host, "svg", { height: RULER + this.height, tabindex: 0, role: "application", "aria-label": label });
    for (const lane of this.lanes) {
      const y = RULER + lane.y + lane.height / 2 + 4;
      svg(this.svg, "text", { class: "lane", x: 0, y }).textContent = lane.text;
    }
    this.ruler = svg(this.svg, "svg", { x: GUTTER, y: 0, height: RULER });
    this.plot = svg(this.svg, "svg", { class: "plot", x: GUTTER, y: RULER, height: this.height });
    svg(this.plot, "rect", { class: "ground", width: "100%", height: "100%" });
    this.back = svg(this.plot, "g");
    this.front = svg(this.plot, "g");
    this.range = svg(this.plot, "rect", { class: "range", y: 0, height: this.height, visibility: "hidden" });
    if (this.area) this.area.path = svg(this.front, "path", { class: "area" });
    this.items.forEach((item, index) => this.add(item, index));
    this.makeStrip(host);
    this.listen();
    for (const [text, name, act] of [["−", "Zoom out", () => this.zoom(2)], ["+", "Zoom in", () => this.zoom(0.5)], ["All", "Show all", () => this.all()]]) {
      const button = html("button", { type: "button", "aria-label": `${name}: ${this.label}` }, text);
      button.addEventListener("click", act);
      this.buttons?.append(button);
    }
    new ResizeObserver(() => this.resize()).observe(this.svg);
    this.resize();
  }

  add(item, index) {
    item.element = svg(this.front, "g", { class: "item", "data-kind": item.kind });
    item.element.dataset.index = index;
    item.rect = svg(item.element, "rect", { class: `${item.kind} ${item.shape ?? ""}`, y: item.y, height: item.height });
    if (item.text) item.name = svg(item.element, "text", { y: item.y + item.height / 2 + 4 });
  }

  /** The whole axis in little, with a window that shows and moves what is drawn above. */
  makeStrip(host) {
    const height = 26;
    this.strip = svg(host, "svg", { class: "strip", height, "aria-hidden": "true" });
    this.little = svg(this.strip, "svg", { x: GUTTER, height, preserveAspectRatio: "none", viewBox: `${this.begin} 0 ${this.end - this.begin} ${height}` });
    svg(this.little, "rect", { class: "ground", x: this.begin, width: this.end - this.begin, height });
    for (const item of this.items) {
      const [y, size] = [3 + (item.y / this.height) * (height - 6), Math.max((item.height / this.height) * (height - 6), 1.5)];
      svg(this.little, "rect", { class: item.kind, x: item.from, y, width: item.to - item.from, height: size });
    }
    this.window = svg(this.strip, "rect", { class: "window", y: 0.5, height: height - 1, rx: 3 });
  }

  resize() {
    this.width = Math.max(this.svg.clientWidth - GUTTER - 1, 100);
    for (const part of [this.ruler, this.plot, this.little]) part.setAttribute("width", this.width);
    this.draw();
  }

  x(at) {
    return ((at - this.view[0]) / (this.view[1] - this.view[0])) * this.width;
  }

  at(event) {
    const share = (event.clientX - this.plot.getBoundingClientRect().left) / this.width;
    return this.view[0] + clamp(share, 0, 1) * (this.view[1] - this.view[0]);
  }

  draw() {
    for (const item of this.items) {
      const x = this.x(item.from);
      const width = Math.max(this.x(item.to) - x, 1);
      const isSeen = x < this.width && x + width > 0;
      item.element.setAttribute("display", isSeen ? "inline" : "none");
      if (!isSeen) continue;
      // Rectangles far wider than the plot are cut, so that their names stay in sight.
      const left = Math.max(x, -2);
      const seen = Math.min(x + width, this.width + 2) - left;
      item.rect.setAttribute("x", left);
      item.rect.setAttribute("width", seen);
      if (item.name) {
        const letters = Math.floor((seen - 8) / 6.4);
        const isWhole = item.text.length <= letters;
        item.name.setAttribute("x", left + 5);
        item.name.textContent = isWhole ? item.text : letters < 4 ? "" : `${item.text.slice(0, letters - 1)}…`;
      }
    }
    this.drawBack();
    const whole = this.end - this.begin;
    this.window.setAttribute("x", GUTTER + ((this.view[0] - this.begin) / whole) * this.width);
    this.window.setAttribute("width", ((this.view[1] - this.view[0]) / whole) * this.width);
    [this.svg.dataset.from, this.svg.dataset.to] = this.view;
  }

  drawBack() {
    this.back.replaceChildren();
    this.ruler.replaceChildren();
    for (const band of this.bands) {
      const x = this.x(band.from);
      svg(this.back, "rect", { class: "band", x, y: 0, width: this.x(band.to) - x, height: this.height });
    }
    const rough = ((this.view[1] - this.view[0]) * 90) / this.width;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max([1, 2, 5, 10].find((factor) => factor * power >= rough) * power, this.tickMin ?? 0);
    for (let at = Math.ceil(this.view[0] / step) * step; at <= this.view[1]; at += step) {
      const x = this.x(at);
      svg(this.back, "line", { class: "grid", x1: x, x2: x, y1: 0, y2: this.height });
      if (x < this.width - 50) svg(this.ruler, "text", { x: x + 3, y: 15 }).textContent = this.tick(at, step);
      svg(this.ruler, "line", { class: "grid", x1: x, x2: x, y1: 4, y2: RULER });
    }
    if (!this.area) return;
    const { y, height, max, points } = this.area;
    const level = (value) => y + height - (value / (max || 1)) * (height - 4);
    let path = `M${this.x(this.begin)} ${level(0)}`;
    for (const [at, value] of points) path += `H${this.x(at)}V${level(value)}`;
    this.area.path.setAttribute("d", `${path}H${this.x(this.end)}V${level(0)}Z`);
  }

  /** Shows the part from `from` to `to`, as far as there is one. */
  show(from, to) {
    const whole = this.end - this.begin;
    const span = clamp(to - from, Math.min(this.spanMin, whole), whole);
    const begin = clamp(from + (to - from - span) / 2, this.begin, this.end - span);
    this.view = [begin, begin + span];
    this.draw();
  }

  all() {
    this.show(this.begin, this.end);
  }

  zoom(factor, at = (this.view[0] + this.view[1]) / 2) {
    this.show(at - (at - this.view[0]) * factor, at + (this.view[1] - at) * factor);
  }

  move(share) {
    const by = (this.view[1] - this.view[0]) * share;
    const kept = clamp(by, this.begin - this.view[0], this.end - this.view[1]);
    this.show(this.view[0] + kept, this.view[1] + kept);
  }

  /** Shows an item with some of what is around it. */
  zoomTo(item) {
    const margin = Math.max(item.to - item.from, this.spanMin) * 0.25;
    this.show(item.from - margin, item.to + margin);
  }

  /** Lights an item up, and what belongs to it. */
  light(item) {
    this.front.classList.toggle("dimmed", Boolean(item?.groups));
    const shares = (other) => other === item || other.groups?.some((group) => group !== undefined && group !== null && item.groups?.includes(group));
    for (const other of this.items) other.element.classList.toggle("lit", item !== null && Boolean(shares(other)));
  }

  choose(item) {
    this.chosen?.element.classList.remove("chosen");
    this.chosen = item;
    this.light(item);
    if (!item) return tip.hide();
    item.element.classList.add("chosen");
    if (item.to < this.view[0] || item.from > this.view[1]) {
      const half = (this.view[1] - this.view[0]) / 2;
      const middle = (item.from + item.to) / 2;
      this.show(middle - half, middle + half);
    }
    const box = item.rect.getBoundingClientRect();
    tip.show(item, box.left + box.width / 2, box.bottom - 8);
    document.getElementById("spoken").textContent = `${item.title}. ${item.facts.map((fact) => fact.join(" ")).join(", ")}`;
  }

  /** Returns the neighbour of what is chosen: in its row, or the nearest in the next row. */
  neighbour(key) {
    const seen = this.items.find((item) => item.to >= this.view[0]) ?? this.items[0];
    if (!this.chosen) return seen;
    const { row, from } = this.chosen;
    const rows = [...new Set(this.items.map((item) => item.row))].sort((a, b) => a - b);
    if (key === "ArrowUp" || key === "ArrowDown") {
      const next = rows[rows.indexOf(row) + (key === "ArrowDown" ? 1 : -1)];
      const near = this.items.filter((item) => item.row === next).sort((a, b) => Math.abs(a.from - from) - Math.abs(b.from - from));
      return near[0] ?? this.chosen;
    }
    const same = this.items.filter((item) => item.row === row).sort((a, b) => a.from - b.from);
    return same[same.indexOf(this.chosen) + (key === "ArrowRight" ? 1 : -1)] ?? this.chosen;
  }

  listen() {
    const itemAt = (event) => this.items[event.target.closest?.(".item")?.dataset.index] ?? null;
    let drag = null;
    this.plot.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.move((event.deltaX || event.deltaY) / this.width);
      else this.zoom(Math.exp(clamp(event.deltaY, -400, 400) * 0.002), this.at(event));
    }, { passive: false });
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.plot.setPointerCapture(event.pointerId);
      drag = { at: this.at(event), x: event.clientX, last: event.clientX, moves: event.shiftKey, item: itemAt(event) };
    });
    this.plot.addEventListener("pointermove", (event) => {
      if (!drag) {
        const item = itemAt(event);
        this.light(item ?? this.chosen);
        if (item) tip.show(item, event.clientX, event.clientY);
        else tip.hide();
      } else if (drag.moves) {
        this.move((drag.last - event.clientX) / this.width);
        drag.last = event.clientX;
      } else {
        const [x, other] = [this.x(drag.at), this.x(this.at(event))];
        this.range.setAttribute("x", Math.min(x, other));
        this.range.setAttribute("width", Math.abs(x - other));
        this.range.setAttribute("visibility", "visible");
        tip.hide();
      }
    });
    this.plot.addEventListener("pointerup", (event) => {
      this.range.setAttribute("visibility", "hidden");
      const isDrag = drag && Math.abs(event.clientX - drag.x) > 4;
      if (isDrag && !drag.moves) this.show(...[drag.at, this.at(event)].sort((a, b) => a - b));
      else if (drag && !isDrag) this.choose(drag.item);
      drag = null;
    });
    this.plot.addEventListener("pointercancel", () => { drag = null; });
    this.plot.addEventListener("pointerleave", () => { tip.hide(); this.light(this.chosen); });
    this.plot.addEventListener("dblclick", () => this.all());
    this.listenToStrip();
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("blur", () => this.choose(null));
  }

  listenToStrip() {
    const centre = (event) => {
      const share = (event.clientX - this.strip.getBoundingClientRect().left - GUTTER) / this.width;
      const [middle, half] = [this.begin + share * (this.end - this.begin), (this.view[1] - this.view[0]) / 2];
      const from = clamp(middle - half, this.begin, this.end - 2 * half);
      this.show(from, from + 2 * half);
    };
    this.strip.addEventListener("pointerdown", (event) => { this.strip.setPointerCapture(event.pointerId); centre(event); });
    this.strip.addEventListener("pointermove", (event) => { if (event.buttons & 1) centre(event); });
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const keys = {
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), "0": () => this.all(),
      Escape: () => this.choose(null), Enter: () => this.chosen && this.zoomTo(this.chosen),
    };
    const sideways = { ArrowLeft: -0.2, ArrowRight: 0.2 }[event.key];
    const act = event.shiftKey && sideways ? () => this.move(sideways) : event.key.startsWith("Arrow") ? () => this.choose(this.neighbour(event.key)) : keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }
}
