// Opens the page that `bcg inspect --html` wrote in a headless browser and uses it: node test_page.mjs PAGE INSPECTED
// (the JSON that the same call printed). Leaves a screenshot beside the page.

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

import chromium, { inflate, setupLambdaEnvironment } from "@sparticuz/chromium";
import { chromium as playwright } from "playwright-core";

const [pageFile, inspectedFile] = process.argv.slice(2);
const inspected = JSON.parse(readFileSync(inspectedFile, "utf8"));

/** Starts the browser of the package, with the libraries and fonts that it brings along. */
async function launch() {
  const bin = join(dirname(fileURLToPath(import.meta.resolve("@sparticuz/chromium"))), "..", "bin");
  await inflate(join(bin, "al2023.tar.br"));
  setupLambdaEnvironment(join(tmpdir(), "al2023", "lib"));
  // Without this it would look for the fonts that it brings along in other folders, and show no text.
  process.env.FONTCONFIG_FILE = join(tmpdir(), "page-fonts.conf");
  writeFileSync(process.env.FONTCONFIG_FILE, `<fontconfig><dir>${join(tmpdir(), "fonts")}</dir></fontconfig>`);
  // Containers run this as root, where the browser's sandbox does not work; it opens nothing but the page.
  return playwright.launch({ executablePath: await chromium.executablePath(), args: ["--no-sandbox"] });
}

const DATA = /(<script type="application\/json" id="data">)(.*?)(<\/script>)/s;
const dataOf = (text) => JSON.parse(text.match(DATA)[2]);

/**
 * Writes a page as GPUs would have made it: kernels of each step on two streams, and names that are no HTML. A second rank has
 * one kernel more, a collective in which it waited.
 */
function writeGpuPage(numRanks = 1) {
  const text = readFileSync(pageFile, "utf8");
  const data = dataOf(text);
  const kernels = data.steps.map(({ part, begin_us }, step) => (
    { name: "<b>kernel</b>", rank: 0, stream: 7, wait_us: null, begin_us: begin_us + 20, duration_us: 0.5, step, part }
  ));
  const last = kernels.at(-1);
  kernels.push({ ...last, name: "aside", stream: 9 }, { ...last, name: "late", begin_us: last.begin_us + 30, part: null });
  const busyUs = [5];
  if (numRanks > 1) {
    kernels.push({ ...last, name: "all_reduce", rank: 1, wait_us: 3 });
    busyUs.push(4);
  }
  const gpu = { kernels, gpu: { busy_us: busyUs, span_us: 50 }, no_gpu: null, model: "<img src=x onerror=alert(1)>" };
  const file = pageFile.replace(/\.html$/, "-gpu.html");
  const json = JSON.stringify({ ...data, ...gpu }).replaceAll("<", "\\u003c");
  writeFileSync(file, text.replace(DATA, (_, open, __, close) => open + json + close));
  return file;
}

/** Opens a page; what it logs and what it asks the network for is noted. */
async function open(browser, file, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1360, height: 900 }, ...options });
  const page = await context.newPage();
  const noise = [];
  page.on("console", (message) => noise.push(message.text()));
  page.on("pageerror", (error) => noise.push(error.stack));
  page.on("request", (request) => { if (!request.url().startsWith("file:")) noise.push(request.url()); });
  await page.goto(pathToFileURL(file).href);
  return { page, noise };
}

const chartOf = (page, id) => page.locator(`#${id} svg`).first();
const viewOf = async (page, id) => {
  const { from, to } = await chartOf(page, id).evaluate((chart) => ({ ...chart.dataset }));
  return [Number(from), Number(to)];
};
const span = ([from, to]) => to - from;
const tip = (page) => page.locator("#tip");

const tests = {
  async "the timeline has a mark for each step that the description has"({ page }) {
    const marks = (kind) => page.locator(`#timeline .item[data-kind="${kind}"] .step`).count();
    const { steps } = dataOf(readFileSync(pageFile, "utf8"));
    const healed = steps.map(({ part }) => part).filter((part) => part.kind === "healed");
    assert.equal(await marks("break"), inspected.num_breaks);
    // A healed launch stands for the segments that it merges.
    const merged = healed.reduce((sum, part) => sum + part.num_segments, 0);
    assert.equal((await marks("segment")) + merged, inspected.num_segments);
    assert.equal(await marks("healed"), healed.length);
  },

  async "the table has a row for each break, with its place in the source"({ page }) {
    const rows = page.locator("#breaks tbody tr");
    assert.equal(await rows.count(), inspected.num_breaks);
    const one = inspected.steps.find((step) => step.kind === "break");
    const text = await rows.first().textContent();
    for (const part of [one.name, one.file, String(one.line)]) assert.ok(text.includes(part), `${part} in ${text}`);
  },

  async "hovering over a step shows what it is, and leaving hides it"({ page }) {
    assert.equal(await tip(page).isVisible(), false);
    await page.locator('#timeline .item[data-kind="break"] rect').first().hover();
    assert.match(await tip(page).textContent(), /break 0.*host.*launches/s);
    await page.locator("#title").hover();
    assert.equal(await tip(page).isVisible(), false);
  },

  async "the wheel zooms around the pointer and the button shows all again"({ page }) {
    const whole = await viewOf(page, "timeline");
    await page.locator("#timeline .plot").hover();
    await page.mouse.wheel(0, -400);
    const zoomed = await viewOf(page, "timeline");
    assert.ok(span(zoomed) < span(whole) * 0.6, `${zoomed} of ${whole}`);
    const middle = ([from, to]) => (from + to) / 2;
    assert.ok(Math.abs(middle(zoomed) - middle(whole)) < span(whole) * 0.02, "the pointer was in the middle");
    await page.getByRole("button", { name: "Show all: Timeline" }).click();
    assert.deepEqual(await viewOf(page, "timeline"), whole);
  },

  async "dragging zooms into the range, and dragging with Shift moves"({ page }) {
    const box = await page.locator("#timeline .plot").boundingBox();
    const drag = async (from, to) => {
      await page.mouse.move(box.x + box.width * from, box.y + box.height - 3);
      await page.mouse.down();
      await page.mouse.move(box.x + box.width * to, box.y + box.height - 3, { steps: 4 });
      await page.mouse.up();
    };
    const whole = await viewOf(page, "timeline");
    await drag(0.25, 0.75);
    const zoomed = await viewOf(page, "timeline");
    assert.ok(Math.abs(span(zoomed) - span(whole) / 2) < span(whole) * 0.02, `${zoomed} of ${whole}`);
    await page.keyboard.down("Shift");
    await drag(0.5, 0.25);
    await page.keyboard.up("Shift");
    const moved = await viewOf(page, "timeline");
    assert.ok(moved[0] > zoomed[0] && Math.abs(span(moved) - span(zoomed)) < 1e-6, `${moved} after ${zoomed}`);
    await page.locator("#timeline .plot").dblclick({ position: { x: 5, y: 3 } });
    assert.deepEqual(await viewOf(page, "timeline"), whole);
  },

  async "the keyboard alone chooses, zooms and tells"({ page }) {
    const whole = await viewOf(page, "timeline");
    await chartOf(page, "timeline").focus();
    await page.keyboard.press("ArrowRight");
    const first = await tip(page).locator("strong").textContent();
    await page.keyboard.press("ArrowRight");
    const second = await tip(page).locator("strong").textContent();
    assert.notEqual(first, second);
    assert.ok((await page.locator("#spoken").textContent()).startsWith(second));
    await page.keyboard.press("+");
    assert.ok(Math.abs(span(await viewOf(page, "timeline")) - span(whole) / 2) < 1e-6);
    await page.keyboard.press("Enter");
    const [from, to] = await viewOf(page, "timeline");
    const { begin_us: begin, duration_us: duration } = dataOf(readFileSync(pageFile, "utf8")).steps[1];
    assert.ok(from <= begin && begin + duration <= to && to - from < 2 * duration + 1, `${from} to ${to}`);
    await page.keyboard.press("0");
    assert.deepEqual(await viewOf(page, "timeline"), whole);
    await page.keyboard.press("Escape");
    assert.equal(await tip(page).isVisible(), false);
  },

  async "a break's button shows it in the timeline"({ page }) {
    const whole = await viewOf(page, "timeline");
    await page.getByRole("button", { name: /Show break 1/ }).click();
    assert.ok(span(await viewOf(page, "timeline")) < span(whole));
    assert.match(await tip(page).locator("strong").textContent(), /^break 1/);
  },

  async "the memory has a rectangle for each block, and hovering shows its address"({ page }) {
    const { blocks } = dataOf(readFileSync(pageFile, "utf8")).memory;
    assert.ok(blocks.length > 0);
    assert.equal(await page.locator("#memory .block").count(), blocks.length);
    await page.locator("#memory .block").first().hover();
    assert.match(await tip(page).textContent(), /block 0.*taken in.*address/s);
  },

  async "each kernel has a mark on its stream, idle time is marked, and hovering lights up what belongs together"({ browser }) {
    const { page, noise } = await open(browser, writeGpuPage());
    const lanes = await page.locator("#timeline .lane").allTextContents();
    assert.deepEqual(lanes, ["Host", "GPU stream 7", "GPU stream 9"]);
    const { kernels } = dataOf(readFileSync(pageFile.replace(/\.html$/, "-gpu.html"), "utf8"));
    assert.equal(await page.locator("#timeline .kernel").count(), kernels.length);
    assert.ok((await page.locator("#timeline rect.gap").count()) > 0);
    await page.locator("#timeline .kernel").first().hover();
    assert.match(await tip(page).textContent(), /^<b>kernel<\/b>.*part of/s);
    assert.equal(await page.locator("#timeline .lit .step").count(), 1);
    assert.match(await page.locator("#title").textContent(), /^<img src=x/);
    assert.equal(await page.locator("img, #tip b").count(), 0, "names are text");
    assert.deepEqual(noise, []);
  },

  async "each rank has lanes of its own, and a collective says how long it waited"({ browser }) {
    const { page, noise } = await open(browser, writeGpuPage(2));
    const lanes = await page.locator("#timeline .lane").allTextContents();
    assert.deepEqual(lanes, ["Host", "Rank 0, stream 7", "Rank 0, stream 9", "Rank 1, stream 7"]);
    await page.locator("#timeline .kernel").last().hover();
    assert.match(await tip(page).textContent(), /^all_reduce.*rank.*1.*waited for another rank.*3/s);
    assert.match(await page.locator("#tiles").textContent(), /GPU busy10\.0 % · 8\.0 %/);
    assert.deepEqual(noise, []);
  },

  async "nothing is wider than a narrow window"({ page }) {
    await page.setViewportSize({ width: 480, height: 900 });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(wide <= 480, `${wide} pixels`);
  },
};

const browser = await launch();
let failed = 0;
for (const [name, test] of Object.entries(tests)) {
  const opened = await open(browser, pageFile);
  try {
    await test({ ...opened, browser });
    assert.deepEqual(opened.noise, [], "the page logs nothing and loads nothing");
    console.log(`ok    ${name}`);
  } catch (error) {
    failed += 1;
    console.error(`FAILED ${name}\n${error.stack}`);
  }
  await opened.page.context().close();
}
const grounds = new Set();
for (const colorScheme of ["light", "dark"]) {
  const { page } = await open(browser, pageFile, { colorScheme });
  grounds.add(await page.evaluate(() => getComputedStyle(document.body).backgroundColor));
  await page.screenshot({ path: `${pageFile.replace(/\.html$/, "")}-${colorScheme}.png`, fullPage: true });
}
await browser.close();
assert.equal(grounds.size, 2, "the page looks the same in light and dark mode");
console.log(`${Object.keys(tests).length - failed} of ${Object.keys(tests).length} passed in ${browser.version()}`);
process.exit(failed ? 1 : 0);
