// What a report's page does beyond being read: theme, filter, sorted tables, and curves to zoom and to compare.
"use strict";
(() => {
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8, SHOWN = 6;
// Told apart without colour too; five, so that no two of 40 lines are alike.
const DASHES = ["none", "7 4", "2 3", "10 3 2 3", "5 2"];
const data = JSON.parse(document.getElementById("data").textContent || '{"runs":[]}');
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const charts = [];

function make(name, attributes = {}, ...children) {
  const drawn = ["svg", "g", "path", "line", "text", "circle", "rect", "clipPath", "defs"].includes(name);
  const node = drawn ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function show(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

// --- sorted tables ---------------------------------------------------------------------------------------------
const collator = new Intl.Collator("en", { numeric: true });

function keyOf(cell) {
  if (cell === undefined) return null;
  const { number, text } = cell.dataset;
  if (number === undefined) return text ?? cell.textContent.trim();
  return number === "" || Number.isNaN(Number(number)) ? null : Number(number);
}

function sort(header, table) {
  const column = header.cellIndex, body = table.tBodies[0];
  const before = header.getAttribute("aria-sort");
  const first = header.textContent.includes("higher is better") ? "descending" : "ascending";
  const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
  const sign = order === "ascending" ? 1 : -1;
  const keyed = [...body.rows].map((row) => [keyOf(row.cells[column]), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return sign * (typeof a === "number" ? a - b : collator.compare(a, b));
  });
  all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", order);
  body.append(...keyed.map(([, row]) => row));
}

function sortable(table) {
  if (table.dataset.ready || table.classList.contains("facts") || table.tBodies[0].rows.length < 2) return;
  table.dataset.ready = "yes";
  for (const header of table.tHead.rows[0].cells) {
    const words = header.firstChild, remark = header.querySelector("small");
    if (words === null || !words.textContent.trim()) continue;
    header.prepend(make("button", { type: "button", onclick: () => sort(header, table) }, words));
    if (remark) header.append(remark);
  }
}

// --- curves ----------------------------------------------------------------------------------------------------
function ticks(low, high, count, whole) {
  let step = 10 ** Math.floor(Math.log10((high - low) / count || 1));
  for (const factor of [1, 2, 5, 10]) if ((high - low) / (step * factor) <= count) { step *= factor; break; }
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function logTicks(low, high) {
  const powers = [];
  for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) powers.push(10 ** k);
  const fine = powers.flatMap((power) => [power, 2 * power, 5 * power]);
  const inside = (values) => values.filter((value) => value >= low && value <= high);
  if (inside(powers).length >= 3) return inside(powers);
  return inside(fine).length >= 2 ? inside(fine) : ticks(low, high, 4).filter((value) => value > 0);
}

class Chart {
  constructor(root, runs) {
    this.root = root;
    this.runs = runs;
    this.single = runs.length === 1;
    this.chosen = new Set(runs.slice(0, SHOWN));
    const here = runs.flatMap((k) => data.runs[k].lines);
    this.metrics = [...new Set(here.map(([metric]) => metric))];
    this.splits = [...new Set(here.map(([, split]) => split))];
    this.metric = this.metrics[0];
    const validation = data.splits.indexOf("validation");
    this.split = this.single ? -1 : this.splits.includes(validation) ? validation : this.splits[0];
    this.axis = here.some(([, , axis]) => new Set(data.axes[axis][1]).size > 1) ? 1 : 0;
    this.range = null;
    this.cursor = null;
    this.pointers = new Map();
    this.build();
    charts.push(this);
    // Also draws it at first, once it is near the window.
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  build() {
    const id = `clip-${charts.length}`;
    this.svg = make("svg", {
      class: "curves", tabindex: "0", role: "application", "aria-describedby": `${id}-hint`,
      onpointerdown: (e) => this.down(e), onpointermove: (e) => this.move(e), onpointerup: (e) => this.up(e),
      onpointercancel: (e) => this.up(e), onpointerleave: () => this.point(null), ondblclick: () => this.zoom(null),
      onkeydown: (e) => this.key(e),
    });
    this.svg.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
    this.clip = id;
    this.reading = make("span", { "aria-live": "polite" });
    this.legend = make("ul", { class: "legend", "aria-label": this.single ? "Lines" : "Runs to compare" });
    this.resetButton = make("button", { type: "button", disabled: true, onclick: () => this.zoom(null) }, "Reset zoom");
    this.logBox = make("input", { type: "checkbox", onchange: () => this.draw() });
    const hint = "Drag, pinch, or Ctrl + wheel to zoom; keys: + − zoom, ← → read values, Shift + ← → move, 0 resets.";
    const list = make("div", {}, this.legend);
    if (!this.single) {
      list.prepend(make("div", { class: "choices" },
        make("button", { type: "button", onclick: () => this.choose(this.visible()) }, "Tick all listed"),
        make("button", { type: "button", onclick: () => this.choose([]) }, "Untick all")));
    }
    this.root.append(
      make("div", { class: "choices" }, ...this.selects(), make("label", {}, this.logBox, "log scale"), this.resetButton),
      make("div", { class: "plot" },
        make("div", {}, this.svg, make("p", { class: "hint" }, this.reading, make("span", { id: `${id}-hint` }, hint))), list));
    this.hint = this.root.querySelector(`#${id}-hint`);
    this.list();
  }

  selects() {
    const pick = (label, values, current, change) => {
      const options = values.map(([value, name]) => make("option", { value, selected: value === current }, name));
      const select = make("select", { onchange: (e) => { change(Number(e.target.value)); this.list(); this.draw(); } }, ...options);
      return make("label", {}, label, select);
    };
    const splits = this.splits.map((k) => [k, data.splits[k]]);
    if (splits.length > 1) splits.push([-1, splits.length === 2 ? "both" : "all"]);
    return [
      pick("metric", this.metrics.map((k) => [k, data.metrics[k]]), this.metric, (k) => { this.metric = k; }),
      pick("split", splits, this.split, (k) => { this.split = k; }),
      pick("over", [[1, "epochs"], [0, "steps"]], this.axis, (k) => { this.axis = k; this.range = this.cursor = null; }),
    ];
  }

  // One entry of the legend for each run, or for each split of the only one.
  list() {
    this.entries = [];
    const keys = this.single ? this.splits.filter((k) => this.split < 0 || k === this.split) : this.runs;
    this.legend.replaceChildren(...keys.map((key) => {
      const look = this.single ? this.splits.indexOf(key) : this.runs.indexOf(key);
      const value = make("output", {});
      const swatch = make("svg", { viewBox: "0 0 36 12", "aria-hidden": "true" },
        make("line", { x1: 0, x2: 36, y1: 6, y2: 6, class: `stroke-${look % COLOURS}`, "stroke-dasharray": DASHES[look % DASHES.length] }));
      const run = data.runs[this.single ? this.runs[0] : key];
      const name = make("span", { class: "name" }, this.single ? data.splits[key] : run.name);
      const best = run.best[this.axis];
      if (best !== null && !this.single) name.append(make("small", {}, `best: ${this.axis ? "epoch" : "step"} ${best}`));
      this.entries.push({ key, value });
      if (this.single) return make("li", {}, make("span", { class: "entry" }, swatch, name, value));
      const others = () => [...this.chosen].filter((k) => k !== key);
      const box = make("input", { type: "checkbox", onchange: (e) => this.choose(e.target.checked ? [...others(), key] : others()) });
      return make("li", {}, make("label", {}, box, swatch, name, value));
    }));
    const best = data.runs[this.runs[0]].best[this.axis];
    if (this.single && best !== null) {
      const ring = make("svg", { viewBox: "0 0 36 12", "aria-hidden": "true" }, make("circle", { cx: 18, cy: 6, r: 4.5 }));
      const words = `best: ${this.axis ? "epoch" : "step"} ${best}`;
      this.legend.append(make("li", {}, make("span", { class: "entry" }, ring, make("span", { class: "name" }, words))));
    }
    this.filter(this.listed ?? null);
  }

  // listed: numbers of runs, or null for all. Until runs are ticked by hand the first of those listed are drawn.
  filter(listed) {
    this.listed = listed;
    if (this.single) return;
    const shown = this.runs.filter((k) => listed?.has(k) ?? true);
    if (!this.byHand) this.chosen = new Set(shown.slice(0, SHOWN));
    this.entries.forEach(({ key }, k) => {
      this.legend.children[k].hidden = !shown.includes(key);
      this.legend.children[k].querySelector("input").checked = this.chosen.has(key);
    });
  }

  visible() { return this.entries.filter((_, k) => !this.legend.children[k].hidden).map(({ key }) => key); }

  choose(keys) {
    [this.chosen, this.byHand] = [new Set(keys), true];
    this.filter(this.listed ?? null);
    this.draw();
  }

  lines() {
    const found = [];
    for (const k of this.runs) {
      if (!this.chosen.has(k) || !(this.listed?.has(k) ?? true)) continue;
      for (const [metric, split, axis, values] of data.runs[k].lines) {
        if (metric !== this.metric || (this.split >= 0 && split !== this.split)) continue;
        const log = this.logBox.checked;
        const points = data.axes[axis][this.axis].map((x, i) => [x, values[i]])
          .map(([x, y]) => [x, y === null || (log && y <= 0) ? null : y]);
        const look = this.single ? this.splits.indexOf(split) : this.runs.indexOf(k);
        const thin = !this.single && this.split < 0 && data.splits[split] === "train";
        found.push({ run: k, split, look, thin, points, best: data.runs[k].best[this.axis] });
      }
    }
    return found;
  }

  scales(lines) {
    const xs = lines.flatMap(({ points }) => points.map(([x]) => x));
    let [low, high] = [Math.min(...xs), Math.max(...xs)];
    if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
    this.whole = [low, high];
    const [left, right] = this.range ?? this.whole;
    let ys = lines.flatMap(({ points }) => points.filter(([x, y], i) => y !== null
      && (points[i + 1]?.[0] ?? x) >= left && (points[i - 1]?.[0] ?? x) <= right).map(([, y]) => y));
    if (!ys.length) ys = [this.logBox.checked ? 0.1 : 0, 1];
    const log = this.logBox.checked, way = log ? Math.log10 : (y) => y;
    let [bottom, top] = [Math.min(...ys), Math.max(...ys)].map(way);
    const room = (top - bottom) * 0.06 || Math.abs(top) * 0.1 || 0.5;
    bottom -= room;
    top += room;
    const { width, height } = this;
    const [l, r, t, b] = [58, 14, 26, 44];
    this.inner = [l, t, Math.max(40, width - l - r), height - t - b];
    const [, , w, h] = this.inner;
    this.toX = (x) => l + ((x - left) / (right - left)) * w;
    this.ofX = (px) => left + ((px - l) / w) * (right - left);
    this.toY = (y) => t + h - ((way(y) - bottom) / (top - bottom)) * h;
    const back = (y) => (log ? 10 ** y : y);
    this.marks = [ticks(left, right, Math.max(3, w / 60), right - left > 3),
      log ? logTicks(back(bottom), back(top)) : ticks(bottom, top, Math.max(3, h / 45))];
  }

  draw() {
    this.width = Math.max(240, this.svg.clientWidth);
    this.height = this.width < 520 ? 300 : this.single ? 320 : 400;
    this.drawn = this.lines();
    this.svg.setAttribute("height", this.height);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.resetButton.disabled = this.range === null;
    const metric = data.metrics[this.metric];
    this.svg.setAttribute("aria-label", `Curves of ${metric}, ${this.drawn.length} lines; arrow keys read the values`);
    if (!this.drawn.length) {
      this.svg.replaceChildren(make("text", { x: this.width / 2, y: this.height / 2, "text-anchor": "middle" },
        this.chosen.size ? "No such curve of the ticked runs" : "Tick a run to see its curve"));
      return;
    }
    this.scales(this.drawn);
    const [l, t, w, h] = this.inner, all = make("g", {});
    for (const x of this.marks[0]) {
      all.append(make("line", { class: "grid", x1: this.toX(x), x2: this.toX(x), y1: t, y2: t + h }),
        make("text", { x: this.toX(x), y: t + h + 17, "text-anchor": "middle" }, show(x)));
    }
    for (const y of this.marks[1]) {
      all.append(make("line", { class: "grid", x1: l, x2: l + w, y1: this.toY(y), y2: this.toY(y) }),
        make("text", { x: l - 7, y: this.toY(y) + 4, "text-anchor": "end" }, show(y)));
    }
    const split = this.split < 0 ? "" : `, ${data.splits[this.split]}`;
    const log = this.logBox.checked ? ", log scale" : "";
    all.append(make("text", { class: "title", x: l, y: 14 }, `${metric}${split}${log}`),
      make("text", { class: "title", x: l + w / 2, y: t + h + 37, "text-anchor": "middle" }, this.axis ? "epoch" : "step"));
    const clipped = make("g", { "clip-path": `url(#${this.clip})` });
    for (const line of this.drawn) clipped.append(...this.line(line));
    this.over = make("g", {});
    const frame = make("rect", { x: l - 8, y: t - 8, width: w + 16, height: h + 16 });
    this.svg.replaceChildren(make("defs", {}, make("clipPath", { id: this.clip }, frame)), all, clipped, this.over);
    this.read();
  }

  line({ points, look, thin, best }) {
    let path = "", pen = "M";
    for (const [x, y] of points) {
      if (y === null) { pen = "M"; continue; }
      path += `${pen}${this.toX(x).toFixed(1)} ${this.toY(y).toFixed(1)}`;
      pen = "L";
    }
    const colour = `stroke-${look % COLOURS}`, dash = DASHES[look % DASHES.length];
    const parts = [make("path", { class: `line ${colour}${thin ? " thin" : ""}`, d: path, "stroke-dasharray": dash })];
    const known = points.filter(([, y]) => y !== null);
    if (known.length === 1) parts.push(this.circle(known[0], `fill-${look % COLOURS}`, 3));
    const at = best === null ? undefined : known.find(([x]) => x === best);
    if (at && !thin) parts.push(this.circle(at, `best ${colour}`, 5));
    return parts;
  }

  circle([x, y], look, r) { return make("circle", { class: look, cx: this.toX(x), cy: this.toY(y), r }); }

  // The values at the cursor: dots on the lines, numbers in the legend.
  read() {
    const told = new Map();
    this.over.replaceChildren();
    if (this.cursor !== null) {
      const [, t, , h] = this.inner, x = this.toX(this.cursor);
      this.over.append(make("line", { class: "cursor", x1: x, x2: x, y1: t, y2: t + h }));
      for (const { run, split, points, look } of this.drawn) {
        const at = points.find(([px]) => px === this.cursor);
        if (!at) continue;
        const key = this.single ? split : run;
        told.set(key, [...(told.get(key) ?? []), show(at[1])]);
        if (at[1] !== null) this.over.append(this.circle(at, `dot fill-${look % COLOURS}`, 4));
      }
    }
    for (const { key, value } of this.entries) value.textContent = (told.get(key) ?? []).join(" / ");
    const few = [...told].slice(0, 4).map(([key, values]) => `${this.single ? data.splits[key] : data.runs[key].name} ${values.join(" / ")}`);
    this.reading.textContent = this.cursor === null ? "" : `${this.axis ? "epoch" : "step"} ${show(this.cursor)}: ${few.join(", ")}${told.size > 4 ? " …" : ""}`;
    this.hint.hidden = this.cursor !== null;
  }

  stops() {
    const [left, right] = this.range ?? this.whole;
    const found = new Set(this.drawn.flatMap(({ points }) => points.map(([x]) => x)));
    return [...found].filter((x) => x >= left && x <= right).sort((a, b) => a - b);
  }

  point(x) {
    if (!this.drawn?.length) return;
    const near = x === null ? null : this.stops().reduce((a, b) => (a === null || Math.abs(b - x) < Math.abs(a - x) ? b : a), null);
    if (near === this.cursor) return;
    this.cursor = near;
    this.read();
  }

  zoom(range) {
    if (!this.drawn?.length) return;
    if (range !== null) {
      const [low, high] = this.whole, least = (high - low) / 1000;
      const [left, right] = [Math.max(low, Math.min(...range)), Math.min(high, Math.max(...range))];
      if (right - left < least) return;
      range = left <= low && right >= high ? null : [left, right];
    }
    this.range = range;
    this.cursor = null;
    this.draw();
  }

  // Widen (factor > 1) or narrow the range around x.
  scale(factor, x) {
    const [left, right] = this.range ?? this.whole;
    this.zoom([x - (x - left) * factor, x + (right - x) * factor]);
  }

  shift(part) {
    const [left, right] = this.range ?? this.whole, [low, high] = this.whole;
    const by = Math.max(low - left, Math.min(high - right, part * (right - left)));
    if (this.range) this.zoom([left + by, right + by]);
  }

  at(event) { return event.clientX - this.svg.getBoundingClientRect().left; }

  down(event) {
    if (!this.drawn?.length || event.button > 0) return;
    this.pointers.set(event.pointerId, this.at(event));
    this.start = this.pointers.size === 1 ? this.at(event) : null;
    this.pinch = this.pointers.size === 2 ? [...this.pointers.values()].map(this.ofX) : null;
    this.svg.setPointerCapture?.(event.pointerId);
  }

  move(event) {
    if (!this.drawn?.length) return;
    const px = this.at(event);
    if (!this.pointers.has(event.pointerId)) { this.point(this.ofX(px)); return; }
    this.pointers.set(event.pointerId, px);
    if (this.pinch && this.pointers.size === 2) { this.spread(); return; }
    if (event.pointerType === "touch") { this.point(this.ofX(px)); return; }
    if (this.start === null) return;
    const [, t, , h] = this.inner;
    this.over.replaceChildren(make("rect", { class: "brush", x: Math.min(this.start, px), width: Math.abs(px - this.start), y: t, height: h }));
  }

  // Two fingers: what lay under each at the start lies under it now.
  spread() {
    const [a, b] = [...this.pointers.values()], [l, , w] = this.inner;
    if (Math.abs(a - b) < 12) return;
    const slope = (this.pinch[1] - this.pinch[0]) / (b - a), left = this.pinch[0] - (a - l) * slope;
    if (slope > 0) this.zoom([left, left + w * slope]);
  }

  up(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    const px = this.at(event);
    if (event.type === "pointerup" && event.pointerType !== "touch" && this.start !== null && Math.abs(px - this.start) > 6) {
      this.zoom([this.ofX(this.start), this.ofX(px)]);
    } else if (!this.pinch) { this.read(); this.point(this.ofX(px)); }
    this.start = null;
    if (this.pointers.size === 0) this.pinch = null;
  }

  // Without Ctrl or the focus the wheel scrolls the page, as everywhere.
  wheel(event) {
    if (!this.drawn?.length || !(event.ctrlKey || event.metaKey || document.activeElement === this.svg)) return;
    event.preventDefault();
    this.scale(event.deltaY > 0 ? 1.25 : 0.8, this.ofX(this.at(event)));
  }

  key(event) {
    if (!this.drawn?.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const stops = this.stops(), place = stops.indexOf(this.cursor), [left, right] = this.range ?? this.whole;
    const middle = this.cursor ?? (left + right) / 2;
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (way && event.shiftKey) this.shift(0.2 * way);
    else if (way) this.point(stops[place < 0 ? (way > 0 ? 0 : stops.length - 1) : Math.max(0, Math.min(stops.length - 1, place + way))]);
    else if (event.key === "Home") this.point(stops[0]);
    else if (event.key === "End") this.point(stops.at(-1));
    else if (event.key === "+" || event.key === "=") this.scale(0.7, middle);
    else if (event.key === "-") this.scale(1 / 0.7, middle);
    else if (event.key === "0" || event.key === "Escape") this.zoom(null);
    else return;
    event.preventDefault();
  }
}

// --- the page --------------------------------------------------------------------------------------------------
const fits = (text, words) => words.every((word) => text.toLowerCase().includes(word));
let compared = null;

function ready(details) {
  all("table", details).forEach(sortable);
  const root = details.querySelector(".chart");
  if (root && !root.hasChildNodes()) new Chart(root, [Number(root.dataset.run)]);
}

function filter(text, count) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean), runs = all("details.run");
  for (const row of all(".long tbody tr")) row.hidden = !fits(row.textContent, words);
  for (const table of all(".long table")) table.hidden = [...table.tBodies[0].rows].every((row) => row.hidden);
  const overview = new Map(all('.long tbody a[href^="#run-"]').map((a) => [a.hash, a.closest("tr").textContent]));
  for (const run of runs) {
    const { id } = run.querySelector("section");
    run.hidden = !fits(overview.get(`#${id}`) ?? run.querySelector("h3").textContent, words);
  }
  compared?.filter(new Set(runs.flatMap((run, k) => (run.hidden ? [] : [k]))));
  compared?.draw();
  count.textContent = words.length ? `${runs.filter((run) => !run.hidden).length} of ${runs.length} runs` : "";
}

function tools(bar, runs) {
  const inner = make("div", { class: "page" });
  if (runs.length > 1) {
    const count = make("span", { class: "count", role: "status" });
    inner.append(make("input", {
      type: "search", placeholder: "Filter runs", "aria-label": "Filter runs by the words of their row", oninput: (e) => filter(e.target.value, count),
    }), count);
  } else inner.append(make("span", { class: "count" }));
  const root = document.documentElement, wanted = matchMedia("(prefers-color-scheme: dark)");
  const stored = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } },
    set: (theme) => { try { localStorage.setItem("theme", theme); } catch { /* a page from a file may have no storage */ } } };
  const dark = () => (root.dataset.theme ?? (wanted.matches ? "dark" : "light")) === "dark";
  const button = make("button", { type: "button", onclick: () => {
    root.dataset.theme = dark() ? "light" : "dark";
    stored.set(root.dataset.theme);
    label();
  } });
  const label = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  if (["light", "dark"].includes(stored.get())) root.dataset.theme = stored.get();
  wanted.addEventListener("change", label);
  label();
  inner.append(button);
  bar.append(inner);
}

function unfold() {
  const details = /^#run-\d+$/.test(location.hash) ? document.querySelector(location.hash)?.closest("details") : null;
  if (!details) return;
  details.open = true;
  details.hidden = false;
  details.scrollIntoView();
}

const runs = all("details.run");
tools(document.getElementById("tools"), runs);
all(".long table").forEach(sortable);
for (const run of runs) {
  if (run.open) ready(run);
  run.addEventListener("toggle", () => { if (run.open) ready(run); });
}
if (runs.length > 1) {
  const every = (open) => () => runs.forEach((run) => { run.open = open && !run.hidden; });
  document.getElementById("folding").append(
    make("button", { type: "button", onclick: every(true) }, "Unfold all"), make("button", { type: "button", onclick: every(false) }, "Fold all"));
}
const shared = document.getElementById("curves");
if (shared) {
  shared.replaceChildren();
  compared = new Chart(shared, data.runs.map((_, k) => k).filter((k) => data.runs[k].lines.length));
}
addEventListener("hashchange", unfold);
addEventListener("beforeprint", () => { runs.forEach(ready); charts.forEach((chart) => chart.draw()); });
unfold();
})();
