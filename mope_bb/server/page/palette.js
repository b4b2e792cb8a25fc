/** Which colour and which pattern belongs to which expert, and how shares are written. */

import { h } from "./dom.js";

const NUM_COLOURS = 8;

export class Palette {
  /** `experts` as in /mope/info. */
  constructor(experts) {
    this.names = experts.map((expert) => expert.name);
    this.classes = new Map();
    this.byDimension = new Map();
    let next = 0;
    for (const expert of experts) {
      if (expert.is_base) {
        this.classes.set(expert.name, "e-base");
        continue;
      }
      // Beyond eight, colours come again with another pattern.
      this.classes.set(expert.name, `e${next % NUM_COLOURS} again${Math.min(3, Math.floor(next / NUM_COLOURS))}`);
      next += 1;
      if (expert.dimension !== null && !this.byDimension.has(expert.dimension)) {
        this.byDimension.set(expert.dimension, expert.name);
      }
    }
  }

  /** The CSS classes that set `--c`, the expert's colour. */
  of(expert) {
    return this.classes.get(expert) ?? "e-base";
  }

  /** The classes of the first expert that serves `dimension`. */
  ofDimension(dimension) {
    return this.of(this.byDimension.get(dimension) ?? dimension);
  }

  /** A small square in the expert's colour; its name always stands beside it. */
  swatch(expert) {
    return h("span", { class: `swatch ${this.of(expert)}`, "aria-hidden": "true" });
  }
}

/** "84 %"; what is there but below half a percent is "<1 %". */
export function percent(share) {
  const whole = Math.round(share * 100);
  return whole === 0 && share > 0 ? "<1 %" : `${whole} %`;
}

/** "concise 70 %, friendly 30 %", the largest first. */
export function describe(shares) {
  const found = Object.entries(shares).filter(([, share]) => share > 0);
  found.sort((a, b) => b[1] - a[1]);
  return found.map(([name, share]) => `${name} ${percent(share)}`).join(", ");
}
