/** The tokens of one answer as text that can be walked through: one stop for Tab, arrow keys from token to token. */

import { h } from "./dom.js";
import { isEnd } from "./pieces.js";

const LONGEST_BLOCK = 200; // tokens that are laid out anew while one is appended

export class TokenRow {
  /**
   * `onShow(index, isPicked)` when a token is pointed at, focused or picked; `onLeave()` when none is any more.
   */
  constructor(palette, { onShow, onLeave }) {
    this.palette = palette;
    this.onShow = onShow;
    this.onLeave = onLeave;
    this.spans = [];
    this.current = null;
    this.lit = null;
    this.block = h("div");
    this.blockStart = 0;
    this.element = h("div", { class: "tokens", role: "group", "aria-label": "Answer" }, this.block);
    this.element.addEventListener("pointerover", (event) => this.see(event.target));
    this.element.addEventListener("pointerleave", () => this.onLeave());
    this.element.addEventListener("focusin", (event) => this.see(event.target));
    this.element.addEventListener("focusout", () => this.onLeave());
    this.element.addEventListener("click", (event) => this.pick(this.indexOf(event.target)));
    this.element.addEventListener("keydown", (event) => this.press(event));
  }

  /** Append in one go; `entries` are of the field `trace`, each with `turn` where the preference changed before it. */
  append(entries) {
    const fragment = document.createDocumentFragment();
    for (const entry of entries) {
      // The space between words stays uncoloured: what belongs together is seen better.
      const isSpaced = entry.text.startsWith(" ") && entry.text.trim() !== "";
      if (isSpaced) fragment.append(" ");
      if (entry.turn) {
        fragment.append(h("span", { class: "turn", role: "img", "aria-label": entry.turn, title: entry.turn }));
      }
      fragment.append(this.build(entry, isSpaced ? entry.text.slice(1) : entry.text));
    }
    this.block.append(fragment);
    if (this.spans.length - this.blockStart > LONGEST_BLOCK) this.beginBlock();
    if (this.current === null && this.spans.length > 0) this.move(0);
  }

  /** All blocks flow as one text from now on. */
  finish() {
    this.element.classList.add("whole");
  }

  /**
   * With every token browsers lay out the whole block it stands in. So the line that is being written moves to a block
   * of its own, which nobody can see, since a line begins there anyway.
   */
  beginBlock() {
    const top = this.spans.at(-1).offsetTop;
    let start = this.spans.length - 1;
    while (start > this.blockStart && this.spans[start - 1].offsetTop === top) start -= 1;
    const isCut = start === this.blockStart || this.spans[start - 1].getClientRects().length > 1;
    if (isCut || this.spans[start].previousElementSibling !== this.spans[start - 1]) return;
    const range = document.createRange();
    range.setStartBefore(this.spans[start]);
    range.setEndAfter(this.block.lastChild);
    if (range.intersectsNode(document.activeElement) && this.block.contains(document.activeElement)) return;
    this.block = h("div", {}, range.extractContents());
    this.blockStart = start;
    this.element.append(this.block);
  }

  /** Tokens that the pointer or the keyboard is not on, but the chart's pointer is. */
  light(index) {
    this.lit?.classList.remove("lit");
    this.lit = index === null ? null : this.spans[index];
    this.lit?.classList.add("lit");
  }

  /** Focus a token and pin what is known of it. */
  pick(index) {
    if (index === null) return;
    this.move(index);
    this.spans[index].focus();
    this.onShow(index, true);
  }

  hasFocusOn(index) {
    return document.activeElement === this.spans[index];
  }

  build(entry, text) {
    const { strongest, strength } = carrying(entry.carriers);
    const kinds = ["t"];
    if (strongest !== null) kinds.push(this.palette.of(strongest));
    if (entry.is_forced) kinds.push("forced");
    if (isEnd(entry)) kinds.push("end");
    else if (entry.text === "") kinds.push("part"); // a piece of a character that a later token completes
    else if (entry.text.trim() === "" && entry.text.includes("\n")) kinds.push("line-end");
    const span = h("span", { class: kinds.join(" "), "data-index": this.spans.length }, text);
    if (strongest !== null) span.style.setProperty("--strength", `${Math.round(strength * 100)}%`);
    this.spans.push(span);
    return span;
  }

  indexOf(target) {
    const found = target.closest?.(".t");
    return found ? Number(found.dataset.index) : null;
  }

  see(target) {
    const index = this.indexOf(target);
    if (index !== null) this.onShow(index, false);
  }

  /** The one token that Tab reaches. */
  move(index) {
    if (this.current !== null) {
      this.spans[this.current].removeAttribute("tabindex");
      this.spans[this.current].removeAttribute("role");
    }
    this.current = index;
    this.spans[index].setAttribute("tabindex", "0");
    this.spans[index].setAttribute("role", "button");
  }

  press(event) {
    if (this.current === null || event.altKey || event.ctrlKey || event.metaKey) return;
    const last = this.spans.length - 1;
    const to = {
      ArrowRight: () => Math.min(last, this.current + 1),
      ArrowLeft: () => Math.max(0, this.current - 1),
      ArrowDown: () => this.inLine(1),
      ArrowUp: () => this.inLine(-1),
      Home: () => 0,
      End: () => last,
    }[event.key];
    if (to) {
      this.move(to());
      this.spans[this.current].focus();
    } else if (event.key === "Enter" || event.key === " ") this.pick(this.current);
    else return;
    event.preventDefault();
  }

  /** The token nearest to the current one in the next line above or below. */
  inLine(direction) {
    const from = this.spans[this.current].getBoundingClientRect();
    let best = this.current;
    let line = null;
    let distance = Infinity;
    for (let index = this.current + direction; index >= 0 && index < this.spans.length; index += direction) {
      const box = this.spans[index].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < from.height / 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > from.height / 2) break;
      if (Math.abs(box.left - from.left) >= distance) continue;
      distance = Math.abs(box.left - from.left);
      best = index;
    }
    return best;
  }
}

/** Who carried most, and how far above an equal share, from 0 to 1. */
function carrying(carriers) {
  const shares = Object.entries(carriers);
  if (shares.length === 0) return { strongest: null, strength: 0 };
  const [strongest, share] = shares.reduce((most, other) => (other[1] > most[1] ? other : most));
  const equal = 1 / shares.length;
  return { strongest, strength: shares.length === 1 ? 1 : (share - equal) / (1 - equal) };
}
