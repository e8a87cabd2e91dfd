// Small figures with sliders: <vit-sinusoid>, <vit-patches>, <vit-softmax>. Each reads its data from a script of JSON inside it.
(() => {
  if (customElements.get("vit-sinusoid")) return;
  const BLUE = "#0072b2", ORANGE = "#d55e00", GREY = "#767676";
  const SVG = "http://www.w3.org/2000/svg";
  const make = (tag, attributes = {}, ...children) => {
    const element = ["svg", "line", "circle", "path", "rect", "text", "image", "g"].includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
    element.append(...children);
    return element;
  };
  const text = (x, y, words, more = {}) => make("text", { x, y, "font-size": 13, fill: "#111", ...more }, words);

  class Figure extends HTMLElement {
    connectedCallback() {
      if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", () => this.start());
      else this.start();
    }
    start() {
      const source = this.querySelector("script[type='application/json']");
      if (this.controls || !source) return;
      this.data = JSON.parse(source.textContent);
      this.controls = {};
      const rows = this.sliders().map(([name, label, min, max, step, value]) => {
        const input = make("input", { type: "range", min, max, step, value }), output = make("output");
        input.addEventListener("input", () => this.show(true));
        this.controls[name] = input;
        return make("label", {}, make("span", {}, label), input, output);
      });
      this.drawing = make("svg", { class: "vf-drawing", viewBox: this.box(), role: "img" });
      this.says = make("p", { class: "vf-says", "aria-live": "polite" });
      this.replaceChildren(make("div", { role: "group", "aria-label": this.data.title }, make("div", { class: "vf-controls" }, ...rows), this.drawing, this.says));
      this.show();
    }
    value(name) { return Number(this.controls[name].value); }
    tell(name, words) { this.controls[name].nextElementSibling.textContent = words; this.controls[name].setAttribute("aria-valuetext", words); }
    draw(words, ...parts) {
      this.drawing.setAttribute("aria-label", words);
      this.drawing.replaceChildren(...parts);
      this.says.textContent = words;
    }
  }

  // ---- a position as a clock hand, and as a point on two waves
  customElements.define("vit-sinusoid", class extends Figure {
    box() { return "0 0 640 230"; }
    sliders() { return [["position", "Position", 0, this.data.positions - 1, 1, 5], ["pair", "Pair of columns", 0, this.data.dim / 2 - 1, 1, 1]]; }
    show() {
      const { positions, dim, base } = this.data, pos = this.value("position"), i = this.value("pair");
      const speed = base ** (-2 * i / dim), angle = pos * speed, [x, y, r] = [105, 115, 80];
      const [px, py] = [x + r * Math.sin(angle), y - r * Math.cos(angle)];  // as a clock: from 12, to the right
      const place = (p) => 235 + 385 * p / (positions - 1), height = (v) => 115 - 80 * v;
      const wave = (f) => Array.from({ length: 401 }, (_, k) => { const p = k / 400 * (positions - 1); return `${k ? "L" : "M"}${place(p).toFixed(1)} ${height(f(p * speed)).toFixed(1)}`; }).join("");
      this.tell("position", `${pos}`);
      this.tell("pair", `${2 * i} and ${2 * i + 1}`);
      const length = 2 * Math.PI / speed;
      this.draw(`Position ${pos}, columns ${2 * i} and ${2 * i + 1}: the hand has turned by ${pos} · ${speed.toPrecision(3)} = ${angle.toPrecision(3)} radians, so the code holds sin = ${Math.sin(angle).toFixed(2)} and cos = ${Math.cos(angle).toFixed(2)}. A whole turn takes ${length < 1000 ? length.toFixed(1) : Math.round(length)} positions.`,
        make("circle", { cx: x, cy: y, r, fill: "none", stroke: GREY }),
        make("line", { x1: x, y1: y, x2: px, y2: py, stroke: "#111", "stroke-width": 3 }),
        make("line", { x1: x, y1: py, x2: px, y2: py, stroke: BLUE, "stroke-width": 3 }),
        make("line", { x1: x, y1: y, x2: x, y2: py, stroke: ORANGE, "stroke-width": 3, "stroke-dasharray": "6 3" }),
        make("circle", { cx: px, cy: py, r: 5, fill: "#111" }), text(30, 20, "the pair as a clock hand"),
        make("line", { x1: 235, x2: 620, y1: 115, y2: 115, stroke: "#ccc" }),
        make("path", { d: wave(Math.sin), fill: "none", stroke: BLUE, "stroke-width": 2 }),
        make("path", { d: wave(Math.cos), fill: "none", stroke: ORANGE, "stroke-width": 2, "stroke-dasharray": "6 3" }),
        make("line", { x1: place(pos), x2: place(pos), y1: 30, y2: 200, stroke: GREY, "stroke-dasharray": "2 3" }),
        make("circle", { cx: place(pos), cy: height(Math.sin(angle)), r: 5, fill: BLUE }), make("circle", { cx: place(pos), cy: height(Math.cos(angle)), r: 5, fill: ORANGE }),
        text(235, 20, `— sin: column ${2 * i}`, { fill: BLUE }), text(400, 20, `- - cos: column ${2 * i + 1}`, { fill: ORANGE }), text(400, 222, "position"));
    }
  });

  // ---- a photograph under a grid of patches
  customElements.define("vit-patches", class extends Figure {
    box() { return `0 0 ${this.data.width} ${this.data.height}`; }
    sliders() { return [["size", "Patch size", 0, this.data.sizes.length - 1, 1, this.data.sizes.indexOf(this.data.first)]]; }
    show() {
      const { width, height, channels, image } = this.data, p = this.data.sizes[this.value("size")], rows = height / p, cols = width / p, n = rows * cols;
      this.tell("size", `${p} x ${p}`);
      const line = (x1, y1, x2, y2) => make("line", { x1, y1, x2, y2, stroke: "#fff", "stroke-width": p < 12 ? 0.6 : 1.2 });
      const across = Array.from({ length: rows - 1 }, (_, k) => line(0, (k + 1) * p, width, (k + 1) * p));
      const down = Array.from({ length: cols - 1 }, (_, k) => line((k + 1) * p, 0, (k + 1) * p, height));
      const many = (number) => number.toLocaleString("en");
      this.draw(`Patches of ${p} x ${p} pixels: ${rows} rows, ${cols} columns, N = ${many(n)} tokens of ${p} · ${p} · ${channels} = ${many(p * p * channels)} numbers. Attention compares ${many(n)} · ${many(n)} = ${many(n * n)} pairs.`,
        make("image", { href: image, width, height }), ...across, ...down, make("rect", { x: 0, y: 0, width: p, height: p, fill: "none", stroke: ORANGE, "stroke-width": 3 }));
    }
  });

  // ---- softmax of scores whose size grows with the width
  customElements.define("vit-softmax", class extends Figure {
    box() { return "0 0 640 220"; }
    sliders() { return [["width", "Head width d", 0, this.data.widths.length - 1, 1, 3], ["temperature", "Temperature", -2, 2, 0.05, 0]]; }
    show() {
      const d = this.data.widths[this.value("width")], t = 10 ** this.value("temperature"), scores = this.data.scores[String(d)];
      const softmax = (list) => { const top = Math.max(...list), e = list.map((s) => Math.exp(s - top)), sum = e.reduce((a, b) => a + b); return e.map((v) => v / sum); };
      const plain = softmax(scores.map((s) => s / t)), scaled = softmax(scores.map((s) => s / Math.sqrt(d) / t));
      this.tell("width", `${d}`);
      this.tell("temperature", t.toPrecision(2));
      const bars = (left, weights, name, colour) => {
        const step = 280 / weights.length;
        return [text(left, 18, name, { fill: colour }), make("line", { x1: left, x2: left + 280, y1: 195, y2: 195, stroke: GREY }),
          ...weights.map((w, k) => make("rect", { x: left + k * step + 2, width: step - 4, y: 195 - 165 * w, height: 165 * w, fill: colour })),
          text(left, 214, `largest weight ${(100 * Math.max(...weights)).toFixed(1)} %`)];
      };
      const spread = Math.sqrt(scores.reduce((a, s) => a + s * s, 0) / scores.length);
      this.draw(`With d = ${d} the ${scores.length} scores q · k are about ${spread.toFixed(1)} in size (the root of d is ${Math.sqrt(d).toFixed(1)}). At temperature ${t.toPrecision(2)} the largest weight is ${(100 * Math.max(...plain)).toFixed(1)} % without the scale and ${(100 * Math.max(...scaled)).toFixed(1)} % with it; an even share is ${(100 / scores.length).toFixed(1)} %.`,
        ...bars(20, plain, "softmax(q·k / T)", ORANGE), ...bars(340, scaled, "softmax(q·k / (√d · T))", BLUE));
    }
  });
})();
