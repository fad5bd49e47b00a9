(() => {
  const { page, el, make, svg, choices, step } = Page;
  const LIGHT = ["#1d5cd6", "#c85c08", "#0e8a5f", "#a3259b", "#b3261e", "#6b5bd2", "#7a6a00", "#00809b"];
  const DARK = ["#70a8ff", "#ffa854", "#4fd1a0", "#ee82e6", "#ff8f86", "#ab9dff", "#d9c648", "#4fcbe6"];
  const PARTS = { start: "starting", compile: "first steps (compiling)", data: "waiting for data", step: "steps", evaluation: "evaluations", sample: "samples", save: "checkpoints" };
  const BETTER = { loss: -1, bits_per_byte: -1, accuracy: 1, macro_f1: 1, bleu: 1, chrf: 1 };
  const DASHES = ["", "5 3", "1.5 3", "9 3 2 3"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const state = { hidden: new Set(), log: false, step: null, chart: null };
  const several = page.runs.length > 1;
  const color = (run) => {
    const known = dark.matches ? DARK : LIGHT;
    return run < known.length ? known[run] : `hsl(${(run * 137) % 360} 60% ${dark.matches ? 70 : 42}%)`;
  };
  // With one run, colours tell its splits apart.
  const hue = (run, split) => several ? color(run) : color(page.splits.indexOf(split));
  const dash = (split) => several ? DASHES[page.splits.indexOf(split) % DASHES.length] : "";
  const digits = (x, n = 6) => {
    if (x === null) return "not finite";
    if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e7)) return x.toExponential(n - 2).replace(/\.?0+e/, "e");
    return `${+x.toPrecision(n)}`;
  };
  const grouped = (x) => x.toLocaleString("en-US");

  // ---- Curves --------------------------------------------------------------------------------------------------------

  function seriesOf(metric) {
    const found = [];
    page.runs.forEach((run, r) => page.splits.forEach((split) => {
      const curve = (run.curves[metric] || {})[split];
      if (curve && !state.hidden.has(r)) found.push({ run: r, split, steps: curve[0], values: curve[1] });
    }));
    return found;
  }
  function ticks(low, high, most) {
    if (!(high > low)) return [low];
    const raw = (high - low) / most, unit = 10 ** Math.floor(Math.log10(raw));
    const by = [1, 2, 5, 10].map((f) => f * unit).find((x) => x >= raw * 0.999);
    const found = [];
    for (let x = Math.ceil(low / by - 1e-9) * by; x <= high + by * 1e-9; x += by) found.push(Math.abs(x) < by / 1e6 ? 0 : x);
    return found;
  }
  function logTicks(low, high) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const f of [1, 2, 5]) {
      const x = f * 10 ** e;
      if (x >= low * 0.999 && x <= high * 1.001) found.push(x);
    }
    return found.length >= 2 ? found.filter((_, i) => i % Math.ceil(found.length / 6) === 0) : ticks(low, high, 3);
  }
  const short = (x) => Math.abs(x) >= 1e6 ? `${+(x / 1e6).toPrecision(4)}M` : Math.abs(x) >= 1e4 ? `${+(x / 1e3).toPrecision(4)}k` : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(1).replace(".0e", "e") : `${+x.toPrecision(4)}`;
  function extent(lists) {
    let low = Infinity, high = -Infinity;
    for (const list of lists) for (const x of list) if (x !== null) { if (x < low) low = x; if (x > high) high = x; }
    return [low, high];
  }
  function nearest(steps, at) {
    let low = 0, high = steps.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (steps[middle] < at) low = middle + 1; else high = middle; }
    return low > 0 && at - steps[low - 1] <= steps[low] - at ? low - 1 : low;
  }
  const charts = [];
  function draw([metric, name, unit]) {
    const figure = make("figure", "", { "data-metric": metric }), caption = make("figcaption", `${name} `);
    caption.append(make("span", unit));
    figure.append(caption);
    const series = seriesOf(metric), W = Math.max(Math.floor(figure_width()), 220), H = 210, left = 48, bottom = 22, top = 8;
    let [low, high] = extent(series.map((s) => s.values));
    const [first, last] = extent(series.map((s) => s.steps));
    const log = state.log && low > 0;
    if (!Number.isFinite(low)) { figure.append(make("p", series.length ? "No finite value." : "No shown run has this metric.", { class: "note" })); return figure; }
    const of = log ? Math.log : (x) => x, pad = (of(high) - of(low)) * 0.05 || Math.abs(of(low)) * 0.05 || 1;
    if (!log && low >= 0 && low < high * 0.25) low = 0;
    const bottomValue = of(low) - (low === 0 ? 0 : pad), topValue = of(high) + pad;
    const x = (s) => left + (W - left - 8) * (last > first ? (s - first) / (last - first) : 0.5);
    const y = (v) => H - bottom - (H - bottom - top) * (of(v) - bottomValue) / (topValue - bottomValue);
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: "0", "aria-label": `${name}${unit ? ` (${unit})` : ""} by step; arrow keys read values` });
    for (const tick of log ? logTicks(low, high) : ticks(low, high, 4)) {
      root.append(svg("line", { x1: left, x2: W, y1: y(tick), y2: y(tick), class: "rule" }));
      root.append(svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of ticks(first, last, W > 420 ? 6 : 4)) root.append(svg("text", { x: x(tick), y: H - 5, "text-anchor": "middle" }, short(tick)));
    for (const s of series) {
      const group = svg("g", { style: `--c: ${hue(s.run, s.split)}` });
      let path = "", pen = "M";
      s.values.forEach((v, i) => {
        if (v === null || (log && v <= 0)) { pen = "M"; return; }
        path += `${pen}${x(s.steps[i]).toFixed(1)} ${y(v).toFixed(1)}`; pen = "L";
      });
      group.append(svg("path", { d: path, class: "curve", "stroke-dasharray": dash(s.split) }));
      if (s.values.length <= 12) s.values.forEach((v, i) => { if (v !== null) group.append(svg("circle", { cx: x(s.steps[i]), cy: y(v), r: 2.6, class: "dot" })); });
      root.append(group);
    }
    const marks = svg("g", {});
    root.append(marks);
    figure.append(root);
    const chart = { figure, root, marks, series, x, y, W, H, top, bottom, left, first, last };
    charts.push(chart);
    const to = (event) => {
      const box = root.getBoundingClientRect(), at = (event.clientX - box.left) * W / box.width;
      point(chart, first + (last - first) * Math.min(Math.max((at - left) / (W - left - 8), 0), 1));
    };
    root.addEventListener("pointermove", to);
    root.addEventListener("pointerdown", to);
    root.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") point(null, null); });
    root.addEventListener("blur", () => point(null, null));
    root.addEventListener("keydown", (event) => {
      const by = step(event, { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity });
      if (by === undefined) return;
      const steps = series.reduce((a, b) => (b.steps.length > a.length ? b.steps : a), []);
      const now = state.step === null ? -1 : nearest(steps, state.step);
      point(chart, steps[Math.min(Math.max(now + by, 0), steps.length - 1)]);
    });
    return figure;
  }
  function figure_width() {
    const width = el("charts").clientWidth, columns = Math.max(1, Math.floor((width + 32) / (Math.min(330, width) + 32)));
    return (width - 32 * (columns - 1)) / columns;
  }
  function point(chart, at) {
    if (at !== null) {
      // The nearest step of a curve.
      const found = chart.series.map((s) => s.steps[nearest(s.steps, at)]);
      at = found.reduce((a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a));
    }
    state.step = at; state.chart = chart;
    for (const other of charts) mark(other);
  }
  function mark(chart) {
    const { marks, series, x, y, figure, top, H, bottom, W } = chart;
    marks.replaceChildren();
    figure.querySelector(".tip")?.remove();
    if (state.step === null || state.step < chart.first || state.step > chart.last) return;
    marks.append(svg("line", { x1: x(state.step), x2: x(state.step), y1: top, y2: H - bottom, class: "cross" }));
    if (chart !== state.chart) return;
    const tip = make("div", "", { class: "tip", role: "status" });
    tip.append(make("b", `step ${grouped(state.step)}`));
    for (const s of series.slice(0, 12)) {
      const i = nearest(s.steps, state.step), line = make("div");
      if (s.steps[i] !== state.step && s.values.length > 1 && (state.step < s.steps[0] || state.step > s.steps[s.steps.length - 1])) continue;
      line.style.setProperty("--c", hue(s.run, s.split));
      const where = s.steps[i] === state.step ? "" : ` at ${grouped(s.steps[i])}`;
      line.append(make("i"), make("span", `${several ? `${page.runs[s.run].name}, ` : ""}${s.split}${where}`), make("output", digits(s.values[i])));
      tip.append(line);
      if (s.values[i] !== null && Number.isFinite(y(s.values[i]))) marks.append(svg("circle", { cx: x(s.steps[i]), cy: y(s.values[i]), r: 4, class: "at", style: `--c: ${hue(s.run, s.split)}` }));
    }
    figure.append(tip);
    const wide = figure.clientWidth, at = x(state.step) * wide / W, own = tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(at > wide / 2 ? at - own - 12 : at + 12, wide - own))}px`;
  }
  function drawCharts() {
    charts.length = 0;
    state.step = state.chart = null;
    el("charts").replaceChildren(...page.metrics.map(draw));
    if (!page.metrics.length) el("charts").append(make("p", "There are no metrics to draw yet.", { class: "note" }));
  }
  function swatch(split) {
    const root = svg("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
    root.append(svg("line", { x1: 0, x2: 30, y1: 5, y2: 5, stroke: several ? "currentColor" : hue(0, split), "stroke-width": 2, "stroke-dasharray": dash(split) }));
    return root;
  }
  function drawLegend() {
    const runs = several ? page.runs.map((run, r) => {
      const button = make("button", "", { type: "button", "aria-pressed": !state.hidden.has(r), title: "Show or hide" }), box = make("i");
      box.style.background = color(r);
      button.append(box, run.name);
      button.addEventListener("click", () => {
        state.hidden.has(r) ? state.hidden.delete(r) : state.hidden.add(r);
        drawLegend(); drawCharts();
        el("legend").querySelectorAll("button")[r].focus();
      });
      return button;
    }) : [];
    const lines = page.splits.map((split) => { const item = make("span", "", { class: "line" }); item.append(swatch(split), split || "(no split)"); return item; });
    el("legend").replaceChildren(...runs, ...lines);
  }
  function drawScale() {
    choices("scale", ["linear", "logarithmic"], +state.log, (index) => { state.log = index === 1; drawScale(); drawCharts(); });
  }

  // ---- Time ----------------------------------------------------------------------------------------------------------

  const clock = (s) => s >= 3600 ? `${Math.floor(s / 3600)} h ${Math.round(s % 3600 / 60)} min` : s >= 120 ? `${Math.floor(s / 60)} min ${Math.round(s % 60)} s` : `${+s.toPrecision(3)} s`;
  function drawTimes() {
    const names = Object.keys(PARTS);
    el("times").replaceChildren(...page.runs.map((run) => {
      const box = make("div", "", { class: "time" }), title = make("h3", several ? `${run.name} ` : ""), bar = make("div", "", { class: "bar" }), list = make("ul");
      const total = Object.values(run.seconds).reduce((a, b) => a + b, 0);
      title.append(make("span", total ? `${clock(total)} together` : "no times recorded: the run has no rows yet, or its version recorded no times"));
      for (const part of names.filter((p) => run.seconds[p])) {
        const share = run.seconds[part] / total, piece = make("i"), item = make("li"), key = make("i");
        piece.style.width = `${100 * share}%`;
        piece.style.background = key.style.background = color(names.indexOf(part));
        const text = `${PARTS[part]}: ${clock(run.seconds[part])} (${(100 * share).toFixed(1)} %)`;
        piece.title = text;
        item.append(key, text);
        for (const [kind, on] of [["pointerenter", true], ["pointerleave", false]]) piece.addEventListener(kind, () => item.classList.toggle("chosen", on));
        bar.append(piece); list.append(item);
      }
      box.append(title, ...(total ? [bar, list] : []));
      return box;
    }));
  }

  // ---- Samples -------------------------------------------------------------------------------------------------------

  function drawSamples() {
    const steps = [...new Set(page.runs.flatMap((run) => run.samples.map(([at]) => at)))].sort((a, b) => a - b), range = el("samples-range");
    el("samples-section").hidden = !steps.length;
    if (!steps.length) return;
    range.max = steps.length - 1;
    range.parentNode.hidden = steps.length < 2;
    range.parentNode.style.display = el("samples-note").style.display = steps.length < 2 ? "none" : "";
    const show = () => {
      const at = steps[+range.value];
      el("samples-step").textContent = `step ${grouped(at)}`;
      range.setAttribute("aria-valuetext", `step ${at}`);
      el("samples").replaceChildren(...page.runs.filter((run) => run.samples.length).map((run) => {
        const found = run.samples.filter(([of]) => of <= at).pop(), panel = make("div", "", { class: "panel" }), title = make("h3", several ? `${run.name} ` : "");
        title.append(make("span", found ? `step ${grouped(found[0])}` : `first sample at step ${grouped(run.samples[0][0])}`));
        panel.append(title, make("pre", found ? found[1] : "", { tabindex: "0" }));
        return panel;
      }));
    };
    range.value = steps.length - 1;
    range.addEventListener("input", show);
    show();
  }

  // ---- Scores --------------------------------------------------------------------------------------------------------

  function matrix(scores) {
    const names = scores.classes, counts = scores.confusion, box = make("div"), note = make("p", "Rows are true classes, columns predictions; point at a cell.", { class: "note", role: "status" });
    const scroll = make("div", "", { class: "scroll" }), table = make("table", "", { class: "matrix" }), head = make("tr");
    head.append(make("th"), ...names.map((name) => make("th", name, { title: name })));
    table.append(head);
    counts.forEach((row, i) => {
      const line = make("tr"), total = row.reduce((a, b) => a + b, 0);
      line.append(make("th", names[i], { title: names[i] }));
      row.forEach((count, j) => {
        const share = total ? count / total : 0, cell = make("td", `${count}`, { class: i === j ? "right" : "" });
        cell.style.setProperty("--a", (0.6 * share).toFixed(3));
        const on = () => {
          table.querySelector(".chosen")?.classList.remove("chosen");
          cell.classList.add("chosen");
          note.textContent = `${grouped(count)} of ${grouped(total)} of class “${names[i]}” were given “${names[j]}” (${(100 * share).toFixed(1)} %).`;
        };
        cell.addEventListener("pointerenter", on);
        cell.addEventListener("click", on);
        line.append(cell);
      });
      table.append(line);
    });
    scroll.append(table);
    box.append(make("h3", "Confusion matrix"), note, scroll);
    return box;
  }
  function drawScores() {
    const found = page.runs.flatMap((run) => run.scores.map((scores) => [run, scores]));
    el("scores-section").hidden = !found.length;
    el("scores").replaceChildren(...found.map(([run, scores]) => {
      const box = make("div", "", { class: "evaluation" }), list = make("dl");
      box.append(make("h3", `${several ? `${run.name}: ` : ""}${scores.what}`));
      for (const [name, value] of Object.entries(scores.numbers)) {
        const item = make("div");
        item.append(make("dt", name.replaceAll("_", " ")), make("dd", digits(value, 5)));
        list.append(item);
      }
      box.append(list);
      if (scores.confusion) box.append(matrix(scores));
      else if (scores.confusions) {
        box.append(make("h3", `Most frequent confusions of ${scores.count} classes`));
        const table = make("table");
        for (const [right, given, count] of scores.confusions) { const line = make("tr"); line.append(make("td", `${right} → ${given}`), make("td", grouped(count))); table.append(line); }
        box.append(table);
      }
      return box;
    }));
  }

  // ---- Settings ------------------------------------------------------------------------------------------------------

  function table(id, paths) {
    const head = make("tr");
    head.append(make("th", "setting"), ...page.runs.map((run) => make("th", several ? run.name : "value")));
    el(id).replaceChildren(head, ...paths.map((path) => {
      const line = make("tr");
      line.append(make("td", path), ...page.runs.map((run) => make("td", path in run.settings ? run.settings[path] : "–", { class: run.changed.includes(path) ? "" : "default" })));
      return line;
    }));
  }
  function drawSettings() {
    const paths = several ? page.differing : page.runs[0].changed;
    el("settings-title").textContent = several ? "Differences between the runs" : "Settings other than the defaults";
    el("settings-note").textContent = paths.length ? several ? "A grey value is the default; – means that a run has no such setting." : "" : several ? "All settings are equal." : "There are none.";
    table("settings", paths);
    table("all-settings", page.paths);
  }

  // ---- Latest values ---------------------------------------------------------------------------------------------------

  function drawLatest() {
    const head = make("tr");
    head.append(make("th", "metric"), ...page.runs.map((run) => make("th", several ? run.name : "")));
    const rows = page.metrics.flatMap(([metric, name]) => page.splits.filter((split) => page.runs.some((run) => (run.curves[metric] || {})[split])).map((split) => {
      const line = make("tr");
      line.append(make("td", `${name}, ${split}`), ...page.runs.map((run) => {
        const cell = make("td"), curve = (run.curves[metric] || {})[split], better = BETTER[metric];
        if (!curve) { cell.textContent = "–"; return cell; }
        const [steps, values] = curve;
        cell.textContent = digits(values[values.length - 1]);
        if (better && split !== "train" && values.length > 1) {
          const best = values.reduce((a, v, i) => (v !== null && (values[a] === null || better * (v - values[a]) > 0) ? i : a), 0);
          cell.append(make("small", `best ${digits(values[best])}, step ${grouped(steps[best])}`));
        }
        return cell;
      }));
      return line;
    }));
    el("latest").replaceChildren(head, ...rows);
  }

  const notes = [...page.notes, ...page.runs.flatMap((run) => run.notes.map((note) => (several ? `${run.name}: ${note}` : note)))];
  el("notes").textContent = notes.join("\n");
  el("curves-note").textContent = "By step. Point into a picture, or use Tab and the arrow keys, to read values.";
  function drawColors() { drawLegend(); drawCharts(); drawTimes(); }
  drawScale(); drawColors(); drawSamples(); drawScores(); drawSettings(); drawLatest();
  let drawnAt = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawCharts(); } });
  dark.addEventListener("change", drawColors);
  document.documentElement.dataset.ready = "";
})();
