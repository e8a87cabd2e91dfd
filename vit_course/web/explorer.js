// The attention explorer: one custom element, <vit-explorer>, which reads its data from a script of JSON inside it.
// Weights come as bytes, (layer, head, query, key): roots, which are squared here and divided by the sum of their row.
(() => {
  if (customElements.get("vit-explorer")) return;
  let count = 0;
  const COLOURS = [[0, 32, 81], [28, 59, 109], [69, 84, 109], [107, 110, 117], [137, 136, 121], [172, 163, 113], [211, 193, 95], [253, 234, 69]];  // cividis

  const colour = (value) => {
    const at = Math.min(1, Math.max(0, value)) * (COLOURS.length - 1), low = Math.min(Math.floor(at), COLOURS.length - 2);
    return COLOURS[low].map((c, k) => Math.round(c + (at - low) * (COLOURS[low + 1][k] - c)));
  };
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  };
  const percent = (value) => (100 * value).toFixed(1) + " %";
  const inflate = async (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };

  // ---- the arithmetic: square tables of N x N as flat arrays
  const fuse = (heads, way) => {
    const fused = Float64Array.from(heads[0]);
    for (const head of heads.slice(1)) {
      for (let k = 0; k < fused.length; k++) fused[k] = way === "mean" ? fused[k] + head[k] : Math[way](fused[k], head[k]);
    }
    return way === "mean" ? fused.map((value) => value / heads.length) : fused;
  };
  const discard = (fused, n, ratio, prefix) => {
    const candidates = [...fused.keys()].slice(prefix * n), count = Math.floor(ratio * candidates.length + 1e-9);
    const kept = Float64Array.from(fused);
    if (count) candidates.sort((a, b) => fused[a] - fused[b]).slice(0, count).forEach((k) => (kept[k] = 0));
    return kept;
  };
  const mix = (fused, n, residual) => {
    const mixed = fused.map((value) => (1 - residual) * value);
    for (let i = 0; i < n; i++) {
      mixed[i * n + i] += residual;
      let sum = 0;
      for (let j = 0; j < n; j++) sum += mixed[i * n + j];
      for (let j = 0; j < n; j++) mixed[i * n + j] = sum > 0 ? mixed[i * n + j] / sum : Number(i === j);
    }
    return mixed;
  };
  const multiply = (a, b, n) => {
    const product = new Float64Array(n * n);
    for (let i = 0; i < n; i++) for (let k = 0; k < n; k++) {
      const weight = a[i * n + k];
      if (weight) for (let j = 0; j < n; j++) product[i * n + j] += weight * b[k * n + j];
    }
    return product;
  };

  class Explorer extends HTMLElement {
    connectedCallback() {
      if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", () => this.start());  // its children are still to come
      else this.start();
    }

    start() {
      if (this.started) return;
      this.started = true;
      const source = this.querySelector("script[type='application/json']");
      if (!source || typeof DecompressionStream === "undefined") return;  // the still picture stays
      this.data = JSON.parse(source.textContent);
      this.id_ = `vit-explorer-${++count}`;
      Object.assign(this, { picture: 0, query: 0, pinned: false, cache: new Map(), weights: [] });
      this.build();
      this.choosePicture(0);
    }

    get n() { return this.data.prefix.length + this.data.grid[0] * this.data.grid[1]; }

    // ---- the page
    build() {
      const { data } = this, id = this.id_;
      this.classList.toggle("vx-small", data.size[0] < 64);
      const radios = data.pictures.map((p, k) => make("label", {},
        make("input", { type: "radio", name: `${id}-picture`, value: k, checked: k === 0, onchange: () => this.choosePicture(k) }),
        make("img", { src: p.image, alt: p.name, title: p.name, width: Math.round(56 * data.size[1] / data.size[0]), height: 56 })));
      const pictures = make("fieldset", {}, make("legend", {}, "Picture"), make("div", { class: "vx-pictures" }, ...radios));
      this.grid = this.buildGrid();
      this.bar = make("canvas", { width: 128, height: 1, "aria-hidden": "true" });
      [this.low, this.high] = [make("span", {}, "0"), make("span")];
      const bar = make("div", { class: "vx-bar" }, this.low, this.bar, this.high);
      const strip = this.bar.getContext("2d");
      for (let k = 0; k < 128; k++) { strip.fillStyle = `rgb(${colour(k / 127)})`; strip.fillRect(k, 0, 1, 1); }
      this.says = make("p", { class: "vx-says", id: `${id}-says` });
      this.live = make("p", { role: "status", style: "clip-path: inset(50%); height: 1px; overflow: hidden; position: absolute; width: 1px; margin: 0" });
      this.answers = make("ul", { class: "vx-answers" });
      [this.headsTitle, this.heads] = [make("legend"), make("div", { class: "vx-heads" })];
      const help = make("p", { class: "vx-help", id: `${id}-help` },
        "Move over the picture, or use the arrow keys, Home and End, to choose a query. Click or Enter pins it; again, or Escape, lets it go.");
      const left = make("div", { class: "vx-left" }, this.grid, bar, help);
      const right = make("div", { class: "vx-right" }, this.buildControls(), this.says, make("fieldset", {}, make("legend", {}, "The model's answer"), this.answers),
        make("fieldset", {}, this.headsTitle, this.heads));
      this.replaceChildren(make("div", { role: "group", "aria-label": data.title, style: "position: relative" }, pictures, make("div", { class: "vx-main" }, left, right), this.live));
      this.show();
    }

    buildGrid() {
      const { data } = this, [rows, cols] = data.grid;
      const cell = (k) => make("div", { role: "gridcell", tabindex: k ? -1 : 0, "data-token": k });
      const cells = [...Array(this.n).keys()].map(cell), prefix = data.prefix.length;
      cells.slice(0, prefix).forEach((c, k) => c.append(data.prefix[k]));
      const lines = [];
      for (let r = 0; r < rows; r++) lines.push(make("div", { role: "row", class: "vx-row" }, ...cells.slice(prefix + r * cols, prefix + (r + 1) * cols)));
      const style = `grid-template-columns: repeat(${cols}, 1fr); grid-template-rows: repeat(${rows}, 1fr); aspect-ratio: ${data.size[1]} / ${data.size[0]}`;
      this.patches = make("div", { class: "vx-patches", role: "rowgroup", style }, ...lines);
      const first = prefix ? [make("div", { role: "row", class: "vx-prefix" }, ...cells.slice(0, prefix))] : [];
      this.cells = cells;
      const token = (event) => { const c = event.target.closest("[data-token]"); return c && Number(c.dataset.token); };
      return make("div", {
        role: "grid", "aria-label": "Tokens: choose a query", "aria-describedby": `${this.id_}-help`,
        onpointerover: (e) => { const k = token(e); if (e.pointerType === "mouse" && k !== null && !this.pinned) this.ask(k); },
        onclick: (e) => { const k = token(e); if (k !== null) this.pin(k); },
        onkeydown: (e) => this.key(e),
      }, ...first, this.patches);
    }

    buildControls() {
      const { data } = this, layers = data.layers;
      this.controls = {};
      const named = (name, label, control, output) => {
        this.controls[name] = control;
        control.addEventListener("input", () => this.show(true));
        return make("label", { "data-control": name }, make("span", {}, label), output ? make("span", { class: "vx-slide" }, control, output) : control);
      };
      const choice = (name, label, options) => named(name, label, make("select", {}, ...options.map(([value, text]) => make("option", { value }, text))));
      const slide = (name, label, min, max, step, value) => named(name, label, make("input", { type: "range", min, max, step, value }), make("output"));
      const heads = [["mean", "mean of all"], ["max", "largest of all"], ["min", "smallest of all"], ...Array.from({ length: data.heads }, (_, k) => [String(k), `head ${k + 1}`])];
      const shown = make("div", { class: "vx-controls" },
        choice("mode", "Show", [["attention", "one layer"], ["rollout", "rollout"]]),
        slide("layer", "Layer", 1, layers, 1, layers),
        choice("heads", "Heads", heads),
        choice("direction", "Direction", [["row", "row: it looks at"], ["column", "column: looked at by"]]),
        slide("residual", "Residual weight", 0, 1, 0.05, 0.5),
        slide("discard", "Discard ratio", 0, 0.95, 0.05, 0),
        slide("start", "First layer", 1, layers, 1, 1),
        choice("scale", "Colour scale", [["own", "own, this map"], ["shared", "shared, all maps"]]),
        slide("strength", "Map over picture", 0, 100, 5, 65));
      return shown;
    }

    // ---- what happens
    async choosePicture(k) {
      this.picture = k;
      const picture = this.data.pictures[k];
      this.patches.style.backgroundImage = `url("${picture.image}")`;
      if (!this.weights[k]) this.weights[k] = this.unpack(await inflate(picture.attention));
      if (this.picture !== k) return;
      this.cache.clear();
      this.sayAnswers(picture);
      this.show(true);
      this.dispatchEvent(new CustomEvent("ready", { detail: k }));
    }

    unpack(bytes) {
      const n = this.n, { layers, heads } = this.data, tables = [];
      for (let l = 0; l < layers; l++) {
        tables.push([]);
        for (let h = 0; h < heads; h++) {
          const table = new Float64Array(n * n), from = (l * heads + h) * n * n;
          for (let i = 0; i < n; i++) {
            let sum = 0;
            for (let j = 0; j < n; j++) sum += bytes[from + i * n + j] ** 2;
            for (let j = 0; j < n; j++) table[i * n + j] = bytes[from + i * n + j] ** 2 / sum;
          }
          tables[l].push(table);
        }
      }
      return tables;
    }

    pin(k) {
      const same = this.pinned && k === this.query;
      this.pinned = !same;
      this.ask(k, true);
    }

    ask(k, aloud = false) {
      this.query = k;
      this.show(aloud);
    }

    key(event) {
      const { data } = this, cols = data.grid[1], prefix = data.prefix.length, n = this.n;
      const k = Number(event.target.closest("[data-token]")?.dataset.token ?? this.query), patch = k - prefix;
      const first = patch < 0 ? 0 : prefix + patch - (patch % cols), last = patch < 0 ? prefix - 1 : first + cols - 1;
      const moves = {
        ArrowRight: Math.min(k + 1, last), ArrowLeft: Math.max(k - 1, first),
        ArrowDown: patch < 0 ? prefix + Math.min(k, cols - 1) : k + cols < n ? k + cols : k,
        ArrowUp: patch < 0 ? k : patch < cols ? (prefix ? Math.min(patch, prefix - 1) : k) : k - cols,
        Home: event.ctrlKey ? 0 : first, End: event.ctrlKey ? n - 1 : last,
      };
      if (event.key in moves) { this.pinned = false; this.ask(moves[event.key], true); this.cells[this.query].focus(); }
      else if (event.key === "Enter" || event.key === " ") this.pin(k);
      else if (event.key === "Escape" && this.pinned) { this.pinned = false; this.show(true); }
      else return;
      event.preventDefault();
    }

    // ---- the numbers: the table that is shown, (N x N), a row for each query
    value(name) { const text = this.controls[name].value; return isNaN(text) || text === "" ? text : Number(text); }

    matrix(options = {}) {
      const mode = options.mode ?? this.value("mode"), heads = options.heads ?? this.controls.heads.value;
      return mode === "rollout" ? this.rollout(options) : this.attention(options.layer ?? this.value("layer") - 1, heads);
    }

    attention(layer, heads) {
      const tables = this.weights[this.picture][layer];
      return isNaN(heads) ? fuse(tables, heads) : tables[Number(heads)];
    }

    rollout({ upto = this.data.layers, heads = this.controls.heads.value, residual = this.value("residual"), discardRatio = this.value("discard"), start = this.value("start") - 1 } = {}) {
      const way = isNaN(heads) ? heads : "mean", name = [way, residual, discardRatio, start, upto].join();
      if (!this.cache.has(name)) {
        let result = null;
        for (let layer = start; layer < upto; layer++) {
          const layerName = [way, residual, discardRatio, layer].join(), n = this.n;
          if (!this.cache.has(layerName)) {
            const fused = fuse(this.weights[this.picture][layer], way);
            this.cache.set(layerName, mix(discard(fused, n, discardRatio, this.data.prefix.length), n, residual));
          }
          const mixed = this.cache.get(layerName);
          result = result ? multiply(mixed, result, n) : mixed;
        }
        if (this.cache.size > 400) this.cache.clear();
        this.cache.set(name, result);
      }
      return this.cache.get(name);
    }

    // ---- drawing
    line(table) {
      const n = this.n, row = this.value("direction") === "row";
      return Array.from({ length: n }, (_, k) => (row ? table[this.query * n + k] : table[k * n + this.query]));
    }

    largest(values) { return Math.max(...values.slice(this.data.prefix.length), 1e-9); }

    top(table, values) {
      if (this.value("scale") === "own") return this.largest(values);
      if (this.value("mode") === "rollout") return table.reduce((a, b) => Math.max(a, b), 1e-9);
      const name = "largest";
      if (!this.cache.has(name)) this.cache.set(name, this.weights[this.picture].flat().reduce((a, t) => t.reduce((x, y) => Math.max(x, y), a), 0));
      return this.cache.get(name);
    }

    show(aloud = false) {
      const rollout = this.value("mode") === "rollout", { controls } = this;
      if (rollout && !isNaN(controls.heads.value)) controls.heads.value = "mean";
      for (const option of controls.heads.options) option.disabled = rollout && !isNaN(option.value);
      for (const name of ["residual", "discard", "start"]) this.querySelector(`[data-control=${name}]`).hidden = !rollout;
      this.querySelector("[data-control=layer]").hidden = rollout;
      for (const name of ["layer", "residual", "discard", "start", "strength"]) {
        const text = name === "strength" ? `${controls[name].value} %` : name === "layer" || name === "start" ? `${controls[name].value} of ${this.data.layers}` : Number(controls[name].value).toFixed(2);
        controls[name].nextElementSibling.textContent = text;
        controls[name].setAttribute("aria-valuetext", text);
      }
      if (!this.weights[this.picture]) return;
      const table = this.matrix(), values = this.line(table), top = this.top(table, values);
      this.paint(values, top);
      this.high.textContent = percent(top);
      const text = this.describe(values);
      this.says.textContent = text;
      if (aloud) this.live.textContent = text;
      this.paintHeads(rollout, top);
    }

    paint(values, top) {
      const strength = this.value("strength") / 100, prefix = this.data.prefix.length;
      this.grid.classList.toggle("vx-pinned", this.pinned);
      this.cells.forEach((cell, k) => {
        const [r, g, b] = colour(values[k] / top), alpha = k < prefix ? 1 : strength;
        cell.style.backgroundColor = `rgba(${r}, ${g}, ${b}, ${alpha})`;
        if (k < prefix) cell.style.color = 0.3 * r + 0.6 * g + 0.1 * b > 125 ? "#000" : "#fff";
        cell.setAttribute("aria-label", `${this.nameOf(k)}: ${percent(values[k])}`);
        cell.setAttribute("aria-selected", k === this.query);
        cell.tabIndex = k === this.query ? 0 : -1;
      });
    }

    nameOf(k) {
      const prefix = this.data.prefix.length, cols = this.data.grid[1];
      return k < prefix ? this.data.prefix[k] : `row ${Math.floor((k - prefix) / cols) + 1}, column ${((k - prefix) % cols) + 1}`;
    }

    describe(values) {
      const rollout = this.value("mode") === "rollout", row = this.value("direction") === "row", me = this.nameOf(this.query);
      const way = { mean: "mean of all heads", max: "largest of all heads", min: "smallest of all heads" }[this.controls.heads.value] ?? `head ${this.value("heads") + 1}`;
      const what = rollout ? `Rollout from layer ${this.value("start")} to ${this.data.layers}, ${way}` : `Layer ${this.value("layer")}, ${way}`;
      const verb = rollout ? (row ? "is made up of" : "goes into") : row ? "looks at" : "is looked at by";
      const order = [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, 3).map((k) => `${this.nameOf(k)} (${percent(values[k])})`);
      const note = rollout ? (row ? "Shares of all inputs in this one output; together 100 %." : "Its share in each output; together they need not be 100 %.")
        : row && ["max", "min"].includes(this.controls.heads.value) ? "The largest, or smallest, weight of any head for each key; together they need not be 100 %."
        : row ? "The query's weights for all keys; together 100 %." : "The weight that each token gives to it; together they need not be 100 %.";
      return `${what}. ${me[0].toUpperCase() + me.slice(1)}${this.pinned ? " (pinned)" : ""} ${verb}: ${order.join("; ")}. ${note}`;
    }

    sayAnswers(picture) {
      const items = picture.answers.map(([name, probability]) => make("li", {}, make("span", {}, name + (name === picture.label ? " (true)" : "")),
        make("meter", { min: 0, max: 1, value: probability, "aria-label": name }), make("b", {}, percent(probability))));
      const verdict = picture.label === null || !picture.answers.length ? [] : [make("li", { style: "display: block" }, picture.answers[0][0] === picture.label ? `✓ right: ${picture.label}` : `✗ wrong: the true class is ${picture.label}`)];
      this.answers.replaceChildren(...items, ...verdict);
    }

    paintHeads(rollout, top) {
      const { data } = this, [rows, cols] = data.grid, prefix = data.prefix.length, shared = this.value("scale") === "shared";
      this.headsTitle.textContent = rollout ? "After each layer" : `All heads of layer ${this.value("layer")}`;
      const numbers = rollout ? Array.from({ length: data.layers - this.value("start") + 1 }, (_, k) => this.value("start") + k) : Array.from({ length: data.heads }, (_, k) => k + 1);
      const kind = rollout ? "DIV" : "BUTTON";
      if (this.heads.childElementCount !== numbers.length || this.heads.firstElementChild.tagName !== kind) {
        this.heads.replaceChildren(...numbers.map((number) => {
          const canvas = make("canvas", { width: cols, height: rows, "aria-hidden": "true", style: `aspect-ratio: ${data.size[1]} / ${data.size[0]}` });
          const press = () => { this.controls.heads.value = this.controls.heads.value === String(number - 1) ? "mean" : String(number - 1); this.show(true); };
          return rollout ? make("div", {}, canvas, make("span")) : make("button", { type: "button", onclick: press }, canvas, make("span"));
        }));
      }
      numbers.forEach((number, k) => {
        const box = this.heads.children[k], values = this.line(rollout ? this.rollout({ upto: number }) : this.attention(this.value("layer") - 1, String(k)));
        const context = box.firstChild.getContext("2d"), image = context.createImageData(cols, rows), limit = shared && !rollout ? top : this.largest(values);
        for (let p = 0; p < rows * cols; p++) image.data.set([...colour(values[prefix + p] / limit), 255], 4 * p);
        context.putImageData(image, 0, 0);
        box.lastChild.textContent = rollout ? `layer ${number}` : `head ${number}`;
        if (!rollout) box.setAttribute("aria-pressed", this.controls.heads.value === String(k));
      });
    }
  }
  customElements.define("vit-explorer", Explorer);
})();
