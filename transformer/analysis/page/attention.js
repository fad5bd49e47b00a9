(() => {
  const { page, el, make, svg, choices, step } = Page;
  const state = { map: 0, layer: page.start[0], head: page.start[1], initial: false, query: -1, key: -1 };
  const decoded = new Map();
  const map = () => page.maps[state.map];
  const one = () => map().queries === map().keys;
  const texts = (side) => page.texts[side];

  // ---- Weights: 8 bits of their square roots, of a layer at a time ----------------------------------------------------

  async function inflate(text) {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }
  const slot = (m, layer, initial) => `${m}/${layer}/${initial}`;
  async function decode(initial) {
    const wanted = [];
    page.maps.forEach((m, i) => m.layers.forEach((part, layer) => {
      const name = slot(i, layer, initial);
      if (!decoded.has(name)) {
        wanted.push(inflate(initial ? part.initial : part.weights).then((codes) => decoded.set(name, codes)));
      }
    }));
    await Promise.all(wanted);
  }
  function codes(layer = state.layer, head = state.head) {
    const size = texts(map().queries).length * texts(map().keys).length;
    const start = head * size;
    return decoded.get(slot(state.map, layer, state.initial)).subarray(start, start + size);
  }
  const weight = (code) => (code / 255) ** 2;
  const round = (x) => (x >= 0.0995 ? x.toFixed(2) : x >= 0.00995 ? x.toFixed(3) : x > 0 ? x.toFixed(4) : "0");
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(/\s+/).map(Number);
  const largest = (values) => values.reduce((a, b) => (a > b ? a : b), 0);

  // ---- Pictures ------------------------------------------------------------------------------------------------------

  function paint(canvas, values, rows, columns, most) {
    // In a picture with more weights than pixels, each pixel shows its largest weight.
    const height = Math.min(rows, most), width = Math.min(columns, most);
    canvas.width = width; canvas.height = height;
    const pixels = new Uint8Array(width * height);
    for (let r = 0; r < rows; r++) {
      const into = Math.floor(r * height / rows) * width;
      for (let c = 0; c < columns; c++) {
        const at = into + Math.floor(c * width / columns), value = values[r * columns + c];
        if (value > pixels[at]) pixels[at] = value;
      }
    }
    const image = new ImageData(width, height), top = largest(values) || 1, [red, green, blue] = color("--from");
    for (let i = 0; i < pixels.length; i++) image.data.set([red, green, blue, 255 * pixels[i] / top], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
  const label = (layer, head) => `layer ${layer + 1}, head ${head + 1}`;

  function drawThumbs() {
    const box = el("thumbs"), heads = Math.max(...map().layers.map((l) => l.heads));
    box.style.gridTemplateColumns = `auto repeat(${heads}, minmax(0, 1fr))`;
    box.style.maxWidth = `${30 + heads * 104}px`;
    box.replaceChildren();
    map().layers.forEach((part, layer) => {
      const name = make("span", `${layer + 1}`, { class: "name", "aria-hidden": "true" });
      name.style.gridColumn = 1;
      box.append(name);
      for (let head = 0; head < part.heads; head++) {
        const button = make("button", "", { type: "button", title: label(layer, head), "aria-label": label(layer, head) });
        button.dataset.layer = layer; button.dataset.head = head;
        const canvas = document.createElement("canvas");
        paint(canvas, codes(layer, head), texts(map().queries).length, texts(map().keys).length, 96);
        button.append(canvas);
        box.append(button);
      }
    });
    markThumb();
  }
  function markThumb() {
    for (const button of el("thumbs").querySelectorAll("button")) {
      const chosen = +button.dataset.layer === state.layer && +button.dataset.head === state.head;
      button.setAttribute("aria-pressed", chosen);
      button.tabIndex = chosen ? 0 : -1;
    }
  }

  function drawLarge() {
    const rows = texts(map().queries).length, columns = texts(map().keys).length, values = codes();
    const box = el("large");
    box.style.aspectRatio = `${columns} / ${rows}`;
    box.setAttribute("aria-label", `Attention weights of ${label(state.layer, state.head)}: a row for each query, a column for each key`);
    paint(box.querySelector("canvas"), values, rows, columns, 2048);
    const what = page.maps.length > 1 ? `${map().name}, ` : "";
    el("chosen").textContent = (what + label(state.layer, state.head)).replace(/^./, (c) => c.toUpperCase());
    const bar = make("span");
    bar.style.background = "linear-gradient(to right, transparent, rgb(var(--from)))";
    el("scale").replaceChildren("weight 0", bar, `${round(weight(largest(values)))}, shaded by its square root`);
  }

  // ---- Text ----------------------------------------------------------------------------------------------------------

  const visible = (token) => token.replace(/^ +| +$/g, (s) => "·".repeat(s.length));
  function fill(box, side, role) {
    box.replaceChildren();
    box.classList.toggle("words", texts(side).some((t) => t.trim().length > 2 && !t.startsWith("⟨")));
    texts(side).forEach((token, index) => {
      const special = token.startsWith("⟨") && token.length > 1;
      const lines = token.replace(/↵(?=.)/g, "↵\n");  // spaces after a line's end begin the next line
      const span = make("span", lines, { role: "button", "aria-label": `token ${index + 1}: ${token}` });
      span.className = special ? "special" : lines === token ? "" : "lines";
      span.dataset.index = index; span.dataset.side = role; span.tabIndex = index ? -1 : 0;
      box.append(span);
      if (token.endsWith("↵")) box.append("\n");
    });
  }
  function drawTexts() {
    fill(el("from"), map().keys, "key");
    fill(el("to"), map().queries, "query");
  }
  const row = (q) => { const S = texts(map().keys).length; return codes().subarray(q * S, (q + 1) * S); };
  const column = (k) => {
    const S = texts(map().keys).length;
    return Uint8Array.from({ length: texts(map().queries).length }, (_, q) => codes()[q * S + k]);
  };
  function shade(box, values, name, focus) {
    const top = values ? largest(values) || 1 : 1;
    for (const span of box.querySelectorAll("span")) {
      const i = +span.dataset.index, alpha = values ? values[i] / top : 0;
      span.style.backgroundColor = alpha > 0.02 ? `rgb(var(${name}) / ${(0.72 * alpha).toFixed(3)})` : "";
      span.classList.toggle("focus", i === focus);
    }
  }
  function context(tokens, index) {
    let text = "";
    for (let i = index - 1; i >= 0 && text.length < 12; i--) text = tokens[i] + text;
    return text;
  }
  function bars(box, rows, empty) {
    const items = rows.map(([before, token, value, right]) => {
      const item = make("li");
      item.style.setProperty("--w", `${(100 * value).toFixed(1)}%`);
      if (before !== null) item.append(make("span", before, { class: "before" }));
      item.append(make("span", visible(token), { class: "token" }));
      if (right) item.append(make("span", "✓ the text's own", { class: "right" }));
      item.append(make("output", round(value)));
      return item;
    });
    box.replaceChildren(...(items.length ? items : [make("li", empty, { class: "none" })]));
  }
  function top(values, side) {
    const order = [...values.keys()].filter((i) => values[i] > 0).sort((a, b) => values[b] - values[a] || a - b);
    return order.slice(0, 8).map((i) => [context(texts(side), i), texts(side)[i], weight(values[i])]);
  }

  const named = (side, index) => `“${visible(texts(side)[index])}”`;
  function drawFocus() {
    const { query: q, key: k } = state, m = map();
    shade(el("from"), q < 0 ? null : row(q), "--from", one() ? q : k);
    shade(el("to"), k < 0 ? null : column(k), "--to", q);
    const other = (text) => (one() ? "" : text);
    el("from-title").textContent = q < 0 ? `${other(`${m.keys}: `)}whom a token attends to` : `${other(`${m.keys}: `)}whom ${named(m.queries, q)} attends to`;
    el("to-title").textContent = k < 0 ? `${other(`${m.queries}: `)}who attends to a token` : `${other(`${m.queries}: `)}who attends to ${named(m.keys, k)}`;
    el("list-from-title").textContent = q < 0 ? "Attends to" : `${named(m.queries, q)} attends to`;
    el("list-to-title").textContent = k < 0 ? "Is attended to by" : `${named(m.keys, k)} is attended to by`;
    bars(el("list-from"), q < 0 ? [] : top(row(q), m.keys), q < 0 ? "Point at a query." : "no key: all are masked");
    bars(el("list-to"), k < 0 ? [] : top(column(k), m.queries), k < 0 ? "Point at a key." : "no query");
    drawCandidates(q, k);
    const cell = el("large"), rows = texts(m.queries).length, columns = texts(m.keys).length;
    const band = (node, shown, start, extent, at, total) => {
      node.style.display = shown ? "block" : "none";
      node.style[start] = `${(100 * at) / total}%`;
      node.style[extent] = `${100 / total}%`;
    };
    band(cell.querySelector(".row"), q >= 0, "top", "height", q, rows);
    band(cell.querySelector(".column"), k >= 0, "left", "width", k, columns);
  }
  function drawCandidates(q, k) {
    const list = el("list-next"), title = el("list-next-title"), found = page.candidates;
    if (!found) { title.textContent = ""; list.replaceChildren(); return; }
    const at = page.of === "" ? 0 : map().queries === page.of ? q : map().keys === page.of ? k : -1;
    title.textContent = page.predicts.replace(/^./, (c) => c.toUpperCase()) + (page.of && at >= 0 ? `, at ${named(page.of, at)}` : "");
    const rows = at >= 0 ? found[at] || [] : [];
    bars(list, rows.map(([token, p, right]) => [null, token, p, right]), at < 0 ? "Point at a token." : "none: the prefix is not predicted");
  }
  function readout(q, k) {
    const node = el("readout");
    if (q < 0 || k < 0) { node.textContent = "Point into the picture to read a weight."; return; }
    const value = weight(codes()[q * texts(map().keys).length + k]);
    node.replaceChildren(make("b", named(map().queries, q)), ` (${q + 1}) attends to `, make("b", named(map().keys, k)), ` (${k + 1}) with weight `, make("b", round(value)));
  }
  function focus(query, key) {
    state.query = query; state.key = key;
    drawFocus();
  }
  function focusToken(span) {
    const index = +span.dataset.index;
    one() ? focus(index, index) : span.dataset.side === "key" ? focus(-1, index) : focus(index, -1);
    readout(-1, -1);
    for (const other of span.parentNode.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    span.tabIndex = 0;
  }

  // ---- Statistics ----------------------------------------------------------------------------------------------------

  const KINDS = [
    ["entropy", "Entropy", "bits of a query's weights"],
    ["distance", "Distance", "tokens from query to key"],
    ["previous", "Previous token", "weight on it"],
    ["first", "First token", "weight on it"],
    ["divergence", "Divergence", "bits, from the other heads"],
  ];
  const has = (kind) => map().layers[0].after[kind] !== null;
  function drawNumbers() {
    const part = map().layers[state.layer];
    el("numbers").replaceChildren(...KINDS.filter(([kind]) => has(kind)).map(([kind, name, unit]) => {
      const box = make("div");
      const term = make("dt", `${name} `);
      term.append(make("span", unit));
      box.append(term, make("dd", part.after[kind][state.head].toFixed(2)));
      if (part.before) box.append(make("small", `${part.before[kind][state.head].toFixed(2)} ${page.initial}`));
      return box;
    }));
  }
  function chart(kind, name, unit, wide) {
    const layers = map().layers, room = Math.floor(el(wide ? "divergence" : "charts").clientWidth), W = Math.min(wide ? 640 : 270, Math.max(room, 200)), H = wide ? 210 : 150, left = 34, bottom = 22;
    const all = layers.flatMap((l) => [...l.after[kind], ...(l.before ? l.before[kind] : [])]);
    const peak = largest(all) || 1, unitStep = 10 ** Math.floor(Math.log10(peak));
    const limit = [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((f) => f * unitStep).find((x) => x >= peak * 0.9999) || 10 * unitStep;
    const x = (layer, shift) => left + (W - left) * (layer + 0.5 + shift) / layers.length;
    const y = (value) => (H - bottom) - (H - bottom - 8) * value / limit;
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${name} (${unit}) of every head, by layer` });
    for (const tick of [0, limit / 2, limit]) {
      root.append(svg("line", { x1: left, x2: W, y1: y(tick), y2: y(tick), class: "rule" }));
      root.append(svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, `${+tick.toPrecision(3)}`));
    }
    const every = Math.ceil(layers.length / (wide ? 24 : 12));
    const mean = { after: [], before: [] };
    layers.forEach((part, layer) => {
      if (layer % every === 0) root.append(svg("text", { x: x(layer, 0), y: H - 5, "text-anchor": "middle" }, `${layer + 1}`));
      const gap = part.before ? Math.min(0.16, 9 / ((W - left) / layers.length)) : 0;
      const radius = layers.length > 16 ? 2.5 : 3.6;
      for (const [when, shift] of [["before", -gap], ["after", gap]]) {
        if (!part[when]) continue;
        part[when][kind].forEach((value, head) => {
          const chosen = when === "after" && layer === state.layer && head === state.head;
          const name = when === "before" ? "initial" : chosen ? "after chosen" : "after";
          const dot = svg("circle", { cx: x(layer, shift), cy: y(value), r: chosen ? radius + 1.6 : radius, class: name });
          dot.append(svg("title", {}, `${label(layer, head)}: ${value.toFixed(3)}${when === "before" ? `, ${page.initial}` : ""}`));
          if (when === "after") dot.addEventListener("click", () => choose(layer, head));
          root.append(dot);
        });
        mean[when].push(`${x(layer, shift)},${y(part[when][kind].reduce((a, b) => a + b, 0) / part.heads)}`);
      }
    });
    if (wide) {
      if (mean.before.length) root.append(svg("polyline", { points: mean.before.join(" "), class: "initial" }));
      root.append(svg("polyline", { points: mean.after.join(" ") }));
    }
    const figure = make("figure"), caption = make("figcaption", `${name} `);
    caption.append(make("span", unit));
    figure.append(caption, root);
    return figure;
  }
  function drawCharts() {
    const key = page.initial ? ` Filled dots are the trained model, rings the same model ${page.initial}.` : "";
    el("charts-note").textContent = `A dot for each head, by layer: means over all queries of this text but the first.${key} The chosen head is black or white.`;
    el("charts").replaceChildren(...KINDS.slice(0, 4).filter(([kind]) => has(kind)).map((kind) => chart(...kind, false)));
    el("divergence-note").textContent = "The Jensen–Shannon divergence of two heads’ weights for the same query, in bits, as a mean over queries and over the other heads of the layer: 0 for equal heads, 1 for heads that share no key. Lines are means of a layer" + (page.initial ? `, dashed ${page.initial}.` : ".");
    el("divergence").replaceChildren(chart(...KINDS[4], true));
  }
  function drawTable() {
    const kinds = KINDS.filter(([kind]) => has(kind)), head = make("tr");
    head.append(make("th", "layer"), make("th", "head"));
    for (const [, name] of kinds) {
      if (page.initial) head.append(make("th", `${name}, ${page.initial}`));
      head.append(make("th", page.initial ? `${name}, trained` : name));
    }
    const rows = map().layers.flatMap((part, layer) => Array.from({ length: part.heads }, (_, h) => {
      const line = make("tr");
      line.append(make("td", `${layer + 1}`), make("td", `${h + 1}`));
      for (const [kind] of kinds) {
        if (part.before) line.append(make("td", part.before[kind][h].toFixed(3)));
        line.append(make("td", part.after[kind][h].toFixed(3)));
      }
      return line;
    }));
    el("table").replaceChildren(head, ...rows);
  }

  // ---- Choices -------------------------------------------------------------------------------------------------------

  function drawChoices() {
    choices("maps", page.maps.map((m) => m.name), state.map, (index) => {
      Object.assign(state, { map: index, layer: 0, head: 0, query: -1, key: -1 });
      draw();
    });
    el("left-out").textContent = page.initial && !page.drawn ? `${page.initial}: in the statistics alone, since its pictures would make the page too large.`.replace(/^./, (c) => c.toUpperCase()) : "";
    choices("states", page.initial && page.drawn ? ["trained", page.initial] : [], +state.initial, async (index) => {
      await decode(index === 1);
      state.initial = index === 1;
      drawChoices(); drawThumbs(); drawHead();
    });
  }
  function drawHead() { markThumb(); drawLarge(); drawFocus(); readout(-1, -1); drawNumbers(); }
  function choose(layer, head) {
    Object.assign(state, { layer, head });
    drawHead(); drawCharts();
  }
  function draw() {
    drawChoices(); drawTexts(); drawThumbs();
    if (state.query < 0 && state.key < 0) {
      const last = texts(map().queries).length - 1;
      Object.assign(state, one() ? { query: last, key: last } : { query: last });
    }
    drawHead(); drawCharts(); drawTable();
  }

  el("thumbs").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) choose(+button.dataset.layer, +button.dataset.head);
  });
  el("thumbs").addEventListener("keydown", (event) => {
    const by = step(event, { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] });
    if (!by) return;
    const layer = Math.min(Math.max(state.layer + by[0], 0), map().layers.length - 1);
    choose(layer, Math.min(Math.max(state.head + by[1], 0), map().layers[layer].heads - 1));
    el("thumbs").querySelector("[aria-pressed='true']").focus();
  });
  for (const box of document.querySelectorAll(".tokens")) {
    const on = (event) => { const span = event.target.closest("span[data-index]"); if (span) focusToken(span); };
    box.addEventListener("pointerover", on);
    box.addEventListener("focusin", on);
    box.addEventListener("click", on);
    box.addEventListener("keydown", (event) => {
      const by = step(event, { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -Infinity, End: Infinity });
      const spans = [...box.querySelectorAll("span")], now = spans.indexOf(event.target);
      if (by !== undefined && now >= 0) spans[Math.min(Math.max(now + by, 0), spans.length - 1)].focus();
    });
  }
  const large = el("large");
  function pointed(event) {
    const box = large.getBoundingClientRect(), rows = texts(map().queries).length, columns = texts(map().keys).length;
    const at = (x, size, count) => Math.min(Math.max(Math.floor((x / size) * count), 0), count - 1);
    const q = at(event.clientY - box.top, box.height, rows), k = at(event.clientX - box.left, box.width, columns);
    focus(q, k); readout(q, k);
  }
  large.addEventListener("pointermove", pointed);
  large.addEventListener("click", pointed);
  large.addEventListener("keydown", (event) => {
    const by = step(event, { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] });
    if (!by) return;
    const rows = texts(map().queries).length, columns = texts(map().keys).length;
    const q = Math.min(Math.max(Math.max(state.query, 0) + by[0], 0), rows - 1);
    const k = Math.min(Math.max(Math.max(state.key, 0) + by[1], 0), columns - 1);
    focus(q, k); readout(q, k);
  });
  let drawnAt = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawCharts(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawThumbs(); drawLarge(); });

  decode(false).then(() => {
    draw();
    document.documentElement.dataset.ready = "";
  }).catch((error) => {
    el("failed").textContent = `This browser could not unpack the page's numbers (${error}). A current one can.`;
    el("failed").hidden = false;
  });
})();
