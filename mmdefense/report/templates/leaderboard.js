"use strict";
const rows = JSON.parse(document.getElementById("data").textContent);
const body = document.querySelector(".leaderboard tbody");
const selects = [...document.querySelectorAll("select[data-axis]")];
const buttons = [...document.querySelectorAll("button[data-key]")];
const columns = buttons.map((button) => [button.dataset.key, button.dataset.kind]);
const sorted = { key: "case", up: true };
const colours = 8;
const shapes = [
  "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z", "M-5-5H5V5H-5Z", "M0-6L6 5H-6Z", "M0-7L7 0L0 7L-7 0Z",
];

function value(row, key) {
  const held = row[key];
  return held !== null && typeof held === "object" ? held.mean : held;
}

function shown(held, kind) {
  if (held === null || held === undefined) return "–";
  if (kind === "text") return String(held);
  const scale = kind === "rate" ? 100 : 1;
  const [mean, spread] = typeof held === "object" ? [held.mean, held.sd] : [held, undefined];
  const text = (scale * mean).toFixed(1);
  if (spread === undefined) return text;
  const small = document.createElement("small");
  small.textContent = ` ± ${(scale * spread).toFixed(1)}`;
  return [text, small];
}

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, held] of Object.entries(attributes)) made.setAttribute(key, held);
  if (text !== undefined) made.textContent = text;
  return made;
}

function mark(index, x, y) {
  const path = shapes[Math.floor(index / colours) % shapes.length];
  const at = `translate(${x} ${y})`;
  return element("path", { d: path, transform: at, class: `series-${index % colours + 1}` });
}

function short(axis, text) {
  if (axis === "clean") return `${(100 * Number(text)).toFixed(1)} %`;
  return axis === "net" ? text.replace(/^.*:/, "").replace(/\(.*$/, "") : text;
}

function chosen() {
  const wanted = selects.filter((select) => select.value !== "");
  const kept = rows.filter((row) => wanted.every((s) => String(row[s.dataset.axis]) === s.value));
  const order = sorted.up ? 1 : -1;
  return kept.sort((first, second) => {
    const [a, b] = [value(first, sorted.key), value(second, sorted.key)];
    if (a === null || a === undefined) return 1;
    if (b === null || b === undefined) return -1;
    return order * (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
  });
}

function table(kept) {
  body.replaceChildren(...kept.map((row) => {
    const line = document.createElement("tr");
    for (const [key, kind] of columns) {
      const cell = document.createElement(key === "case" ? "th" : "td");
      if (key === "case") cell.scope = "row";
      if (kind !== "text") cell.className = "number";
      cell.append(...[shown(row[key], kind)].flat());
      line.append(cell);
    }
    const links = document.createElement("td");
    for (const [seed, href] of row.records) {
      const link = document.createElement("a");
      link.href = href;
      link.textContent = seed;
      links.append(link, " ");
    }
    line.append(links);
    return line;
  }));
  document.getElementById("count").textContent = `${kept.length} of ${rows.length} rows`;
}

function scatter(kept) {
  const plot = document.getElementById("plot");
  const [left, right, top, bottom] = [60, 620, 15, 330];
  const points = kept
    .map((row) => [row, value(row, "acc_before") - value(row, "acc_after"), value(row, "asr_after")])
    .filter(([, lost, asr]) => Number.isFinite(lost) && typeof asr === "number");
  const most = Math.max(0.05, ...points.map(([, lost]) => lost));
  const least = Math.min(0, ...points.map(([, lost]) => lost));
  const x = (lost) => left + (right - left) * (lost - least) / (most - least);
  const y = (asr) => bottom - (bottom - top) * asr;
  const parts = [];
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const lost = least + part * (most - least);
    parts.push(element("line", { x1: left, x2: right, y1: y(part), y2: y(part), class: "rule" }));
    parts.push(element("text", { x: left - 8, y: y(part) + 4, "text-anchor": "end" }, `${100 * part}`));
    parts.push(element("text", { x: x(lost), y: bottom + 20, "text-anchor": "middle" }, (100 * lost).toFixed(1)));
  }
  parts.push(element("text", { x: (left + right) / 2, y: bottom + 42, "text-anchor": "middle" }, "utility lost, points"));
  parts.push(element("text", { x: 16, y: (top + bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 16 ${(top + bottom) / 2})` }, "ASR left, %"));
  const names = [...new Set(rows.map((row) => row.defense))].sort();
  for (const [row, lost, asr] of points) {
    const dot = mark(names.indexOf(row.defense), x(lost), y(asr));
    dot.append(element("title", {}, `${row.case}, ${row.defense}: ${(100 * lost).toFixed(1)} points lost, ASR ${(100 * asr).toFixed(1)} %`));
    parts.push(dot);
  }
  plot.replaceChildren(...parts);
  const present = names.filter((name) => points.some(([row]) => row.defense === name));
  document.getElementById("legend").replaceChildren(...present.map((name) => {
    const item = document.createElement("li");
    const sample = element("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" });
    sample.append(mark(names.indexOf(name), 0, 0));
    item.append(sample, name);
    return item;
  }));
}

function draw() {
  for (const button of buttons) {
    const mine = button.dataset.key === sorted.key;
    button.closest("th").setAttribute("aria-sort", mine ? (sorted.up ? "ascending" : "descending") : "none");
  }
  const kept = chosen();
  table(kept);
  scatter(kept);
}

for (const select of selects) {
  const values = [...new Set(rows.map((row) => String(row[select.dataset.axis])))].sort();
  for (const text of values) {
    const option = document.createElement("option");
    option.value = text;
    option.textContent = short(select.dataset.axis, text);
    select.append(option);
  }
  select.addEventListener("change", draw);
}
for (const button of buttons) {
  button.addEventListener("click", () => {
    sorted.up = sorted.key === button.dataset.key ? !sorted.up : true;
    sorted.key = button.dataset.key;
    draw();
  });
}
draw();
