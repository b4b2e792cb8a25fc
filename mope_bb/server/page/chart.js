/** Who weighed how much and who carried how much, token by token: two stacked areas over the same axis. */

import { h, s } from "./dom.js";
import { describe, percent } from "./palette.js";

const FEWEST_TOKENS = 24; // the axis of a beginning answer: its first tokens should not fill the width
const UNIT = 100; // of the vertical axis: browsers draw badly in user units below 1

/** Stacked areas that only grow to the right: adding a token appends to each path, whatever the length. */
class StackedAreas {
  constructor(palette) {
    this.names = palette.names;
    this.num = 0;
    this.highest = 1;
    this.outlines = this.names.map(() => "");
    this.tops = this.names.map(() => null);
    this.paths = this.names.map((name) => s("path", { class: palette.of(name) }));
    // The whole stack is painted first and the lower sums over it, so that no path needs its lower edge.
    this.group = s("g", {}, [...this.paths].reverse());
    this.marks = s("g", { class: "marks" });
    this.cursor = s("rect", { class: "cursor", y: "0", width: "1", visibility: "hidden" });
    this.svg = s("svg", { preserveAspectRatio: "none", "aria-hidden": "true" }, this.group, this.marks, this.cursor);
  }

  add(values) {
    let sum = 0;
    this.names.forEach((name, index) => {
      sum += Math.max(0, values[name] ?? 0);
      const top = Math.round(sum * UNIT * 100) / 100;
      if (top === this.tops[index]) return;
      this.outlines[index] += `H${this.num}V${top}`;
      this.tops[index] = top;
    });
    this.highest = Math.max(this.highest, sum);
    this.num += 1;
  }

  mark(index) {
    this.marks.append(s("line", { x1: index, x2: index, y1: "0", y2: UNIT, "vector-effect": "non-scaling-stroke" }));
  }

  /** Bring what is seen up to date, `width` tokens wide. */
  draw(width) {
    const height = this.highest * UNIT;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.group.setAttribute("transform", `matrix(1 0 0 -1 0 ${height})`);
    this.paths.forEach((path, index) => path.setAttribute("d", `M0 0${this.outlines[index]}H${this.num}V0Z`));
    for (const line of this.marks.children) line.setAttribute("y2", height);
    this.cursor.setAttribute("height", height);
  }

  point(index) {
    this.cursor.setAttribute("visibility", index === null ? "hidden" : "visible");
    if (index !== null) this.cursor.setAttribute("x", index);
  }
}

export class WeightsChart {
  /** `onPoint(index or null)` while the pointer rests on a token's column, `onPick(index)` on a click. */
  constructor(palette, { onPoint, onPick }) {
    this.palette = palette;
    this.weights = new StackedAreas(palette);
    this.carried = new StackedAreas(palette);
    this.sums = { weights: {}, carried: {} };
    this.first = null;
    this.last = null;
    this.turns = [];
    this.isDone = false;
    this.plot = h("div", { class: "plot", role: "img" }, this.weights.svg, this.carried.svg);
    this.scale = h("span", { class: "scale" });
    this.element = h(
      "div",
      { class: "chart" },
      h("span", { class: "axis", "aria-hidden": "true" }, "weight", this.scale),
      h("span", { class: "axis", "aria-hidden": "true" }, "carried"),
      this.plot,
    );
    this.plot.addEventListener("pointermove", (event) => onPoint(this.indexAt(event)));
    this.plot.addEventListener("pointerleave", () => onPoint(null));
    this.plot.addEventListener("click", (event) => {
      const index = this.indexAt(event);
      if (index !== null) onPick(index);
    });
    this.draw();
  }

  get num() {
    return this.weights.num;
  }

  add({ weights, carriers }) {
    this.weights.add(weights);
    this.carried.add(carriers);
    addTo(this.sums.weights, weights);
    addTo(this.sums.carried, carriers);
    if (Object.keys(weights).length > 0) {
      this.first ??= weights;
      this.last = weights;
    }
  }

  /** A line where the preference changed, before the token with this index. */
  mark(index) {
    this.turns.push(index);
    this.weights.mark(index);
    this.carried.mark(index);
  }

  point(index) {
    this.weights.point(index);
    this.carried.point(index);
  }

  draw() {
    const width = this.isDone ? Math.max(1, this.num) : Math.max(FEWEST_TOKENS, this.num);
    // Product-rule weights need not sum to 1.
    this.scale.textContent = this.weights.highest > 1.005 ? `0 to ${this.weights.highest.toFixed(1)}` : "";
    this.weights.draw(width);
    this.carried.draw(width);
  }

  finish() {
    this.isDone = true;
    this.draw();
    this.plot.setAttribute("aria-label", this.summary());
  }

  /** Mean share by expert of what was carried, summing to 1; empty where nothing was. */
  shares() {
    const total = Object.values(this.sums.carried).reduce((sum, share) => sum + share, 0);
    return Object.fromEntries(Object.entries(this.sums.carried).map(([name, share]) => [name, share / total]));
  }

  summary() {
    if (this.first === null) return "No weights.";
    const names = this.palette.names.filter((name) => (this.sums.weights[name] ?? 0) > 0);
    const weights = names.map((name) => {
      const [from, to] = [this.first[name] ?? 0, this.last[name] ?? 0].map(percent);
      return `${name} ${from === to ? from : `from ${from} to ${to}`}`;
    });
    const turns = this.turns.map((index) => ` The preference changed at token ${index + 1}.`).join("");
    return `Weights over ${this.num} tokens: ${weights.join(", ")}.${turns} Carried: ${describe(this.shares())}.`;
  }

  indexAt(event) {
    const box = this.plot.getBoundingClientRect();
    const width = this.weights.svg.viewBox.baseVal.width;
    const index = Math.floor(((event.clientX - box.left) / box.width) * width);
    return index >= 0 && index < this.num ? index : null;
  }
}

function addTo(sums, values) {
  for (const [name, value] of Object.entries(values)) sums[name] = (sums[name] ?? 0) + value;
}
