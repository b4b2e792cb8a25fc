/** One preference: a slider for each dimension, presets, the user's own words, the merge rule. */

import { h } from "./dom.js";
import { describe, percent } from "./palette.js";

const RULES = {
  linear: "The weighted sum of the experts’ probabilities",
  geometric: "The weighted mean of the experts’ logprobs",
  product: "The base, times what each expert adds to it",
};

export class PreferencePanel {
  /** `side` is "A" or "B"; `onMove()` is called whenever what is preferred has changed. */
  constructor(info, palette, side, onMove) {
    this.side = side;
    this.presets = Object.entries(info.presets);
    this.palette = palette;
    this.onMove = onMove;
    this.sliders = new Map();
    this.mix = h("div", { class: "mix", role: "img" });
    this.note = h("p", { class: "note", role: "status" });
    this.buttons = this.presets.map(([name, weights]) =>
      h("button", { type: "button", class: "chip", "aria-pressed": "false", onClick: () => this.set(weights) }, name),
    );
    this.words = info.reads_sentences ? this.buildWords() : null;
    this.rule = h(
      "select",
      { id: `merge-${side}` },
      info.merge_rules.map((name) =>
        h("option", { value: name, selected: name === info.merge, title: RULES[name] }, name),
      ),
    );
    this.more = h(
      "details",
      { class: "more" },
      h("summary", {}, this.words ? "In your own words, merge rule" : "Merge rule"),
      this.words && h("div", { class: "words" }, h("label", { for: this.words.id }, "In your own words"), this.words),
      h("div", { class: "rule" }, h("label", { for: this.rule.id }, "Merge rule"), this.rule),
    );
    this.title = h("h2", { id: `panel-${side}` }, "Preference");
    this.element = h(
      "section",
      { class: "panel", "aria-labelledby": `panel-${side}` },
      h("div", { class: "panel-head" }, this.title, this.mix),
      this.buttons.length > 0 ? h("div", { class: "chips", role: "group", "aria-label": "Presets" }, this.buttons) : null,
      h("div", { class: "sliders" }, info.dimensions.map((dimension) => this.buildSlider(dimension))),
      this.note,
      this.more,
    );
  }

  /** Weights by dimension or a sentence, as the server reads them; null where all sliders stand at 0. */
  get preference() {
    if (this.isInWords) return this.words.value.trim();
    const weights = this.weights();
    return Object.keys(weights).length > 0 ? weights : null;
  }

  get merge() {
    return this.rule.value;
  }

  /** The preference for people. */
  get description() {
    return this.isInWords ? `“${this.words.value.trim()}”` : describe(this.shares());
  }

  get isInWords() {
    return this.element.classList.contains("in-words");
  }

  /** Move all sliders; dimensions that `weights` leaves out go to 0. */
  set(weights) {
    for (const [name, slider] of this.sliders) slider.value = String(Math.round(100 * (weights[name] ?? 0)));
    this.moved(false);
  }

  /** Every slider at the same height, without telling anyone. */
  begin(weights) {
    for (const [name, slider] of this.sliders) {
      slider.value = String(Math.round(100 * (weights ? (weights[name] ?? 0) : 0.5)));
    }
    this.show();
  }

  /** Show what went wrong with this preference, or nothing. */
  tell(message) {
    this.note.textContent = message;
  }

  /** Fold away what is needed less often, where there is little room. */
  fold(isTight) {
    this.more.classList.toggle("folding", isTight);
    this.more.open = !isTight;
  }

  /** "A" or "B" in the heading, where there are two. */
  letter(isShown) {
    this.title.replaceChildren(...(isShown ? [h("span", { class: "letter" }, this.side), "Preference"] : ["Preference"]));
    if (isShown) this.title.setAttribute("aria-label", `Preference ${this.side}`);
    else this.title.removeAttribute("aria-label");
  }

  weights() {
    const found = {};
    for (const [name, slider] of this.sliders) if (slider.valueAsNumber > 0) found[name] = slider.valueAsNumber / 100;
    return found;
  }

  shares() {
    const weights = this.weights();
    const total = Object.values(weights).reduce((sum, weight) => sum + weight, 0);
    return Object.fromEntries(Object.entries(weights).map(([name, weight]) => [name, weight / total]));
  }

  moved(isInWords) {
    this.element.classList.toggle("in-words", isInWords);
    this.show();
    this.tell(this.preference === null ? "All sliders stand at 0: move one of them up." : "");
    if (this.preference !== null) this.onMove(this);
  }

  show() {
    const shares = this.shares();
    for (const [name, slider] of this.sliders) {
      const share = shares[name] ?? 0;
      slider.style.setProperty("--filled", `${slider.value}%`);
      slider.setAttribute("aria-valuetext", `${slider.value}, ${percent(share)} of the preference`);
      slider.nextElementSibling.textContent = percent(share);
      this.mix.children.namedItem(`mix-${this.side}-${name}`).style.flexGrow = String(share);
    }
    this.mix.setAttribute("aria-label", this.isInWords ? "in your own words" : describe(shares) || "nothing");
    this.presets.forEach(([, weights], index) => {
      const isThis = !this.isInWords && isSame(shares, weights);
      this.buttons[index].setAttribute("aria-pressed", String(isThis));
    });
  }

  buildSlider({ name, text }) {
    const id = `slider-${this.side}-${name}`;
    const colour = this.palette.ofDimension(name);
    const slider = h("input", { type: "range", id, min: "0", max: "100", step: "1", value: "0" });
    slider.addEventListener("input", () => this.moved(false));
    this.sliders.set(name, slider);
    this.mix.append(h("span", { id: `mix-${this.side}-${name}`, class: colour }));
    return h(
      "div",
      { class: `slider ${colour}`, title: text },
      h("label", { for: id }, h("span", { class: "swatch", "aria-hidden": "true" }), name),
      slider,
      h("span", { class: "shown", "aria-hidden": "true" }),
    );
  }

  buildWords() {
    const field = h("input", {
      type: "text",
      id: `words-${this.side}`,
      placeholder: "short and friendly, please",
      autocomplete: "off",
      maxlength: "2000",
    });
    // A sentence counts when it is finished, not after every letter.
    field.addEventListener("change", () => this.moved(field.value.trim() !== ""));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.moved(field.value.trim() !== "");
    });
    return field;
  }
}

function isSame(shares, weights) {
  const total = Object.values(weights).reduce((sum, weight) => sum + weight, 0);
  const names = new Set([...Object.keys(shares), ...Object.keys(weights)]);
  return [...names].every((name) => Math.abs((shares[name] ?? 0) - (weights[name] ?? 0) / total) < 0.005);
}
