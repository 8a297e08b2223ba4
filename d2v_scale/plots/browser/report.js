"use strict";
// The curves of a report: uPlot draws them; this says of what, and listens to the controls.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const DASHES = [[], [6, 3], [2, 3], [9, 3, 2, 3], [12, 4], [4, 2, 2, 2, 2, 2], [1, 5], [12, 3, 3, 3]];
  const MOST_IN_TIP = 12;
  const state = { axis: "step", scale: "auto", smoothing: 0, runs: data.runs.map(() => true) };
  const panels = [];
  const make = (tag, attributes = {}, ...inside) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...inside);
    return element;
  };
  const say = (element, name, value) => { element.setAttribute(name, value); return element; };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // --- numbers
  const place = (value) => state.axis === "hours" ? plain(value) : plain(Math.round(value));
  const plain = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return (+value.toPrecision(3)).toExponential();
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
  };
  const withUnit = (value, unit) => {
    if (value === null || value === undefined) return "–";
    if (unit === "share") return `${+(100 * value).toPrecision(4)} %`;
    return plain(value) + (unit && unit !== "count" ? ` ${unit}` : "");
  };
  // An exponential mean without the pull of its start.
  const smoothed = (values, weight) => {
    if (weight === 0) return values;
    let mean = 0, total = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return mean / total;
    });
  };
  // Sorted positions, one value each, as uPlot wants them.
  const table = (line, values) => {
    const x = data.positions[line.x[state.axis]] || [];
    const found = new Map();
    x.forEach((at, i) => { if (values[i] !== undefined) found.set(at, values[i]); });
    const places = [...found.keys()].sort((a, b) => a - b);
    return [places, places.map((at) => found.get(at))];
  };

  // Of a logarithmic scale the powers of ten, or whatever there is where it spans none.
  const decades = (plot, splits) => {
    const found = splits.map((value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9 ? value : null);
    return found.some((value) => value !== null) ? found : splits;
  };

  // --- one panel
  class Panel {
    constructor(figure, spec, log) {
      this.spec = spec;
      this.usesLog = log;
      this.own = null; // its own choice of scale
      this.hidden = new Set(); // names
      const toggle = make("button", { type: "button", title: "logarithmic or linear" });
      toggle.addEventListener("click", () => { this.own = !this.isLog(); this.draw(); });
      this.toggle = toggle;
      this.chart = make("div", { className: "chart" });
      this.tip = make("div", { className: "tip", hidden: true });
      figure.append(make("figcaption", {}, make("span", { textContent: spec.title }), toggle), this.chart, this.names(), this.tip);
      new ResizeObserver(() => this.resize()).observe(this.chart);
    }

    names() {
      const box = make("div", { className: "names" });
      const shown = new Map(this.spec.lines.map((line) => [line.name, line]));
      // A single line needs its name only where the title does not say of what it is.
      if (shown.size < 2 && ["", "share", "count"].includes(this.spec.unit)) return box;
      for (const line of shown.values()) {
        const button = say(make("button", { type: "button" }), "aria-pressed", "true");
        const colour = data.runs.length > 1 ? "currentColor" : line.colour;
        const dash = data.runs.length > 1 ? DASHES[line.style % DASHES.length].join(" ") : "";
        button.innerHTML = `<svg width="24" height="6"><line x1="0" y1="3" x2="24" y2="3" stroke="${colour}" stroke-width="2" stroke-dasharray="${dash}"/></svg>`;
        button.append(line.label);
        button.addEventListener("click", () => {
          const on = this.hidden.delete(line.name) || !this.hidden.add(line.name);
          say(button, "aria-pressed", String(on));
          this.draw();
        });
        box.append(button);
      }
      return box;
    }

    isLog() {
      if (this.own !== null) return this.own;
      return state.scale === "auto" ? this.usesLog : state.scale === "log";
    }

    shown() {
      return this.spec.lines.filter((line) =>
        state.runs[line.run] && !this.hidden.has(line.name) && line.x[state.axis] !== undefined);
    }

    draw() {
      const lines = this.shown();
      // A scale without a positive value has no logarithm.
      const log = this.isLog() && lines.some((line) => line.y.some((value) => value > 0));
      const positive = (values) => log ? values.map((value) => value > 0 ? value : null) : values;
      const tables = [], series = [{}];
      this.lines = [];
      const add = (line, values, options) => {
        tables.push(table(line, values));
        series.push({ spanGaps: true, ...options });
        this.lines.push(line);
      };
      for (const line of lines) {
        const style = { stroke: line.colour, width: 1.6, dash: data.runs.length > 1 ? DASHES[line.style % DASHES.length] : [] };
        const points = { show: line.y.length < 30, size: 5, stroke: line.colour, fill: line.colour };
        if (state.smoothing > 0 && line.y.length > 2) {
          add(line, positive(line.y), { stroke: line.colour, alpha: 0.25, width: 1, points: { show: false }, raw: true });
          add(line, positive(smoothed(line.y, state.smoothing)), { ...style, points: { show: false } });
        } else {
          add(line, positive(line.y), { ...style, points });
        }
        if (line.bad.length > 0) {
          const marks = line.y.map(() => undefined);
          line.bad.forEach((place) => { marks[place] = 0.03; });
          add(line, marks, { scale: "bad", paths: () => null, points: { show: true, size: 9, stroke: "#d22", fill: "#d22" }, bad: true });
        }
      }
      this.series = series;
      this.toggle.textContent = log ? "log" : "linear";
      const range = this.plot ? { min: this.plot.scales.x.min, max: this.plot.scales.x.max } : null;
      const zoomed = this.zoomed && this.axis === state.axis ? range : null;
      this.plot?.destroy();
      this.tip.hidden = true;
      this.chart.replaceChildren();
      if (tables.length === 0) { this.plot = null; return; }
      this.axis = state.axis;
      this.plot = new uPlot(this.options(series, log), uPlot.join(tables), this.chart);
      if (zoomed) this.plot.setScale("x", zoomed); else this.zoomed = false;
    }

    options(series, log) {
      const text = css("--text"), grid = css("--line");
      const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid }, font: "11px system-ui, sans-serif" };
      const unit = this.spec.unit;
      const label = unit === "share" ? (value) => `${+(100 * value).toPrecision(3)} %` : plain;
      return {
        width: Math.max(160, this.chart.clientWidth), height: 200, series, legend: { show: false },
        scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: log ? undefined : this.range }, bad: { range: [0, 1] } },
        axes: [
          { ...axis, size: 44, label: data.axes[state.axis], labelSize: 15, labelFont: "11px system-ui, sans-serif", labelGap: -4, values: (_, ticks) => ticks.map(plain) },
          { ...axis, size: (_, labels) => 24 + 7 * Math.max(3, ...(labels || []).map((one) => one.length)), grid: log ? { ...axis.grid, filter: decades } : axis.grid, values: (_, ticks) => ticks.map((tick) => tick === null ? "" : label(tick)) },
        ],
        cursor: {
          sync: { key: "x", scales: ["x", null] }, drag: { x: true, y: false }, points: { show: true, size: 6 },
          dataIdx: (plot, index, hovered) => this.nearest(plot, index, hovered),
        },
        hooks: {
          setCursor: [(plot) => this.tell(plot)],
          setScale: [(plot, key) => { if (key === "x") this.zoomed = plot.scales.x.min > plot.data[0][0] || plot.scales.x.max < plot.data[0].at(-1); }],
        },
      };
    }

    // All of one value: around it, and what is never below zero does not go there.
    range(plot, low, high) {
      if (low === null) return [0, 1];
      if (low === high) return low === 0 ? [0, 1] : [Math.min(low * 0.9, low * 1.1), Math.max(low * 0.9, low * 1.1)];
      const edge = 0.06 * (high - low);
      return [low >= 0 ? Math.max(0, low - edge) : low - edge, high + edge];
    }

    // Runs are recorded at different places: of each line its nearest one.
    nearest(plot, index, hovered) {
      const values = plot.data[index];
      for (let off = 0; off < values.length; off += 1) {
        for (const at of [hovered - off, hovered + off]) {
          if (values[at] !== null && values[at] !== undefined) return at;
        }
      }
      return hovered;
    }

    tell(plot) {
      const { left, top } = plot.cursor;
      // Others follow the pointer with their cursor alone.
      if (left === undefined || left < 0 || !this.chart.matches(":hover")) { this.tip.hidden = true; return; }
      const found = [];
      this.series.forEach((one, index) => {
        if (index === 0 || one.raw) return;
        const at = plot.cursor.idxs[index], value = plot.data[index][at];
        if (value === null || value === undefined) return;
        const x = plot.data[0][at], line = this.lines[index - 1];
        if (one.bad && Math.abs(plot.valToPos(x, "x") - left) > 8) return;
        found.push({ line, x, bad: one.bad, value, off: one.bad ? 0 : Math.abs(plot.valToPos(value, "y") - top) });
      });
      if (found.length === 0) { this.tip.hidden = true; return; }
      const shown = found.sort((a, b) => a.off - b.off).slice(0, MOST_IN_TIP).sort((a, b) => b.value - a.value);
      const many = data.runs.length > 1, names = this.spec.lines.some((line) => line.name !== this.spec.lines[0].name);
      this.tip.replaceChildren(make("div", { textContent: `${data.axes[state.axis]} ${place(plot.posToVal(left, "x"))}` }));
      for (const { line, bad, value, x } of shown) {
        const swatch = make("i", { className: "swatch" });
        swatch.style.background = line.colour;
        const label = [many ? data.runs[line.run].name : "", names || !many ? line.label : ""].filter(Boolean).join(", ");
        this.tip.append(make("div", {}, swatch, ` ${label}: ${bad ? "not finite" : withUnit(value, this.spec.unit)}`, make("small", { textContent: ` at ${plain(x)}` })));
      }
      if (found.length > shown.length) this.tip.append(make("div", { textContent: `and ${found.length - shown.length} more` }));
      this.tip.hidden = false;
      const room = this.chart.clientWidth - this.tip.offsetWidth;
      this.tip.style.left = `${Math.max(0, Math.min(room, left + 70))}px`;
      this.tip.style.top = `${top + 45}px`;
    }

    resize() {
      if (this.plot && this.chart.clientWidth > 0) this.plot.setSize({ width: this.chart.clientWidth, height: 200 });
    }
  }

  // --- the page
  const curves = document.getElementById("curves");
  for (const part of data.parts) {
    const box = make("div", { className: "part" });
    curves.append(make("h2", { textContent: part.title }), box);
    for (const row of part.rows) {
      const inside = row.panels.length > 1 ? make("div", { className: "row" }) : box;
      if (inside !== box) box.append(inside);
      row.panels.forEach((spec, number) => {
        const figure = say(make("figure", { className: "panel" }), "aria-label", spec.title);
        inside.append(figure);
        panels.push(new Panel(figure, spec, row.log));
        if (number === 0 && row.why) figure.append(make("p", { className: "why", textContent: row.why }));
      });
    }
  }
  const all = () => panels.forEach((panel) => panel.draw());
  const on = (id, event, change) => document.getElementById(id).addEventListener(event, (happened) => { change(happened.target); });
  on("axis", "change", (chosen) => { state.axis = chosen.value; all(); });
  on("scale", "change", (chosen) => { state.scale = chosen.value; panels.forEach((panel) => { panel.own = null; }); all(); });
  on("smoothing", "input", (chosen) => { state.smoothing = Number(chosen.value); all(); });
  on("whole", "click", () => { panels.forEach((panel) => { panel.zoomed = false; }); all(); });
  document.querySelectorAll("input[data-run]").forEach((box) => box.addEventListener("change", () => {
    state.runs[Number(box.dataset.run)] = box.checked;
    all();
  }));
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  const name = () => { document.getElementById("theme").textContent = isDark() ? "light page" : "dark page"; };
  on("theme", "click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); all(); });
  system.addEventListener("change", () => { name(); all(); });
  name();
  all();
  root.dataset.drawn = "yes";
})();
