"use strict";
// Plots are drawn when they come near the view; plotly lies in the page, compressed, and is unpacked for the first of them.

const NARROW_PX = 520, REFRESH_MS = 5000;
const drawn = new WeakMap(); // canvas → the JSON text it shows
let plotly = null;

function loadPlotly() {
  plotly ??= (async () => {
    const packed = document.getElementById("plotly").textContent;
    const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  })();
  return plotly;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const SHORT = 11; // characters of a name beside a plot on a phone
const CROWDED = 15; // more names than this do not fit under one there

function shortened(axis, data, letter) {
  if (axis.type !== "category") return {};
  const values = [...new Set(data.flatMap((trace) => trace[letter] ?? []))].slice(0, 200);
  if (letter === "x" && values.length > CROWDED) return { showticklabels: false }; // of a square table: they are those of its rows
  return { tickvals: values, ticktext: values.map((v) => (v.length > SHORT ? `${v.slice(0, SHORT - 1)}…` : v)) };
}

function dressed({ data, layout }, light) {
  const [text, grid, page] = light ? ["#000", "#ccc", "#fff"] : ["--text", "--grid", "--page"].map(colour);
  const narrow = innerWidth < NARROW_PX;
  const dress = { ...layout, paper_bgcolor: page, plot_bgcolor: page, autosize: true, font: { color: text, size: narrow ? 11 : 13 } };
  dress.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // a finger scrolls the page
  for (const key of Object.keys(dress).filter((k) => /^[xy]axis\d*$/.test(k))) {
    dress[key] = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, ...dress[key], ...(narrow ? shortened(dress[key], data, key[0]) : {}) };
  }
  if (narrow) dress.margin = { ...dress.margin, l: 48, r: 8 };
  return dress;
}

function written(canvas) {
  return document.querySelector(`script[data-for="${CSS.escape(canvas.id)}"]`)?.textContent;
}

function paint(canvas, light = false) {
  const text = written(canvas);
  if (!text) return;
  const figure = JSON.parse(text);
  drawn.set(canvas, text);
  const options = { displayModeBar: false, responsive: true, doubleClick: "reset+autosize" };
  Plotly.react(canvas, figure.data, dressed(figure, light), options);
}

async function draw(canvas) {
  await loadPlotly();
  if (drawn.get(canvas) !== written(canvas)) paint(canvas);
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) {
    watcher.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });

function watch(root) {
  for (const canvas of root.querySelectorAll(".canvas")) watcher.observe(canvas);
}

function repaint(light) {
  for (const canvas of document.querySelectorAll(".canvas")) if (drawn.has(canvas)) paint(canvas, light);
}

// --- keyboard: + and - zoom along x, arrows move, 0 shows all again ---

function zoom(canvas, key) {
  const [low, high] = canvas._fullLayout.xaxis.range;
  const width = high - low, middle = (low + high) / 2;
  const ranges = {
    "+": [middle - width / 4, middle + width / 4], "=": [middle - width / 4, middle + width / 4],
    "-": [middle - width, middle + width],
    ArrowLeft: [low - width / 5, high - width / 5], ArrowRight: [low + width / 5, high + width / 5],
  };
  if (key === "0") paint(canvas), Plotly.relayout(canvas, JSON.parse(written(canvas)).layout.xaxis.range ? {} : { "xaxis.autorange": true });
  else if (ranges[key]) Plotly.relayout(canvas, { "xaxis.range": ranges[key] });
  return key === "0" || key in ranges;
}

document.addEventListener("keydown", (event) => {
  const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
  if (plain && event.target.classList.contains("canvas") && drawn.has(event.target) && zoom(event.target, event.key)) event.preventDefault();
});

// --- tables sorted by a column's button ---

function sortBy(header) {
  const up = header.getAttribute("aria-sort") !== "ascending";
  const column = header.cellIndex, body = header.closest("table").tBodies[0];
  const value = (row) => { const cell = row.cells[column]; return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent; };
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : typeof a === "number" ? -1 : typeof b === "number" ? 1 : a.localeCompare(b, undefined, { numeric: true });
  const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b)));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.sort");
  if (button) sortBy(button.closest("th"));
});

// --- live: what changed is put in place, the reader's place is kept ---

function replacePart(old, fresh) {
  for (const part of fresh.querySelectorAll("details[id]")) {
    const before = document.getElementById(part.id);
    if (before) part.open = before.open;
  }
  const scrolled = new Map([...old.querySelectorAll(".scroll[id]")].map((e) => [e.id, [e.scrollLeft, e.scrollTop]]));
  for (const canvas of fresh.querySelectorAll(".canvas")) {
    const before = document.getElementById(canvas.id);
    if (before && drawn.has(before)) canvas.replaceWith(before); // the drawn plot moves along and is updated, so nothing blinks
  }
  old.replaceChildren(...document.adoptNode(fresh).childNodes);
  old.dataset.state = fresh.dataset.state;
  for (const [id, [left, top]] of scrolled) document.getElementById(id)?.scrollTo(left, top);
  for (const canvas of old.querySelectorAll(".canvas")) drawn.has(canvas) ? draw(canvas) : watcher.observe(canvas);
}

function merge(fresh) {
  const focused = document.activeElement?.id;
  const anchor = [...document.querySelectorAll("[data-state]")].find((e) => e.getBoundingClientRect().bottom > 0);
  const before = anchor?.getBoundingClientRect().top;
  for (const part of fresh.querySelectorAll("[data-state]")) {
    const old = document.getElementById(part.id);
    if (old && old.dataset.state !== part.dataset.state) replacePart(old, part);
  }
  if (anchor) scrollBy(0, anchor.getBoundingClientRect().top - before);
  if (focused && document.activeElement?.id !== focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

const pause = document.getElementById("pause");
let ended = false;

async function refresh(status) {
  try {
    const answer = await fetch(location.href, { cache: "no-cache" });
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    merge(fresh);
    // The page of a run that has ended is not live; one without any parts is the server's, while it makes the first.
    ended = Boolean(fresh.querySelector("[data-state]")) && !fresh.getElementById("pause");
    status.textContent = ended ? "The run has ended: this is its last state" : `Last read ${new Date().toLocaleTimeString()}`;
    pause.hidden = ended;
  } catch (problem) {
    status.textContent = `Not read (${problem.message}); the next try is in ${REFRESH_MS / 1000} s`;
  }
}

if (pause) {
  const status = document.getElementById("live-status");
  pause.addEventListener("click", () => {
    const paused = pause.getAttribute("aria-pressed") !== "true";
    pause.setAttribute("aria-pressed", String(paused));
    if (paused) status.textContent = "Paused";
  });
  const tick = async () => {
    if (pause.getAttribute("aria-pressed") !== "true" && !document.hidden) await refresh(status);
    if (!ended) setTimeout(tick, REFRESH_MS);
  };
  setTimeout(tick, REFRESH_MS);
}

watch(document);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint(false));
addEventListener("beforeprint", () => repaint(true));
addEventListener("afterprint", () => repaint(false));
