/** What is known of one token: weights, shares, and what every expert would have written. One for the whole page. */

import { byId, h } from "./dom.js";
import { describe, percent } from "./palette.js";
import { pieceOf, visible } from "./pieces.js";

const GAP = 8; // pixels between token, popover and the window's edge

export class TokenPopover {
  constructor(palette) {
    this.palette = palette;
    this.anchor = null;
    this.isPinned = false;
    this.onClose = () => {};
    this.element = h("div", { id: "token-popover", class: "popover", role: "tooltip", hidden: true });
    byId("stage").append(this.element);
    // The token keeps the focus, so that the arrow keys go on from it.
    this.element.addEventListener("pointerdown", (event) => event.preventDefault());
    this.element.addEventListener("mousedown", (event) => event.preventDefault());
    document.addEventListener("pointerdown", (event) => {
      const isInside = this.element.contains(event.target) || event.target.closest?.(".t, .plot");
      if (!this.element.hidden && !isInside) this.close();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !this.element.hidden) this.close();
    });
    for (const event of ["scroll", "resize"]) {
      window.addEventListener(event, () => this.follow(), { capture: true, passive: true });
    }
  }

  /** `entry` is of the field `trace`; `number` counts from 1; `onClose()` when it goes away by itself. */
  show(anchor, entry, number, { isPinned = false, onClose = () => {} } = {}) {
    if (this.anchor !== anchor) this.anchor?.removeAttribute("aria-describedby");
    this.anchor = anchor;
    this.isPinned = isPinned;
    this.onClose = onClose;
    this.element.classList.toggle("pinned", isPinned);
    this.element.replaceChildren(...this.content(entry, number));
    this.element.hidden = false;
    anchor.setAttribute("aria-describedby", "token-words");
    this.place();
  }

  /** Gone, unless it is pinned. */
  leave() {
    if (!this.isPinned) this.close();
  }

  close() {
    if (this.element.hidden) return;
    this.element.hidden = true;
    this.isPinned = false;
    this.anchor?.removeAttribute("aria-describedby");
    this.anchor = null;
    this.onClose();
  }

  follow() {
    if (this.element.hidden) return;
    if (!this.anchor.isConnected) this.close();
    else this.place();
  }

  /** Where it hides neither the answer nor its chart if there is room: below the answer, else above or below the token. */
  place() {
    const token = this.anchor.getClientRects()[0] ?? this.anchor.getBoundingClientRect();
    const answer = this.anchor.closest(".answer").getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const right = Math.min(answer.right, document.documentElement.clientWidth - GAP);
    const left = Math.max(GAP, Math.min(token.left - 16, right - width));
    const lowest = window.innerHeight - height - GAP;
    const tops = [answer.bottom + GAP, token.top - GAP - height, token.bottom + GAP];
    const top = tops.find((found) => found >= GAP && found <= lowest) ?? Math.max(GAP, lowest);
    this.element.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }

  content(entry, number) {
    const piece = pieceOf(entry);
    const name = visible(piece);
    const facts = [`token ${number}`];
    if (entry.logprob !== null && !entry.is_forced) facts.push(`probability ${percent(Math.exp(entry.logprob))}`);
    const missed = `Missed mass ${percent(entry.missed_mass ?? 0)}: at most so much was outside the experts’ lists.`;
    return [
      h("p", { id: "token-words", class: "unseen" }, inWords(entry, name, facts)),
      h(
        "div",
        { class: "popover-head" },
        h("code", { class: "token-name" }, name),
        h("span", { class: "soft" }, facts.join(" · ")),
        this.isPinned
          ? h("button", { type: "button", class: "square", tabindex: "-1", "aria-label": "Close", onClick: () => this.close() }, "×")
          : null,
      ),
      entry.is_forced
        ? h("p", {}, "Given by the form: nothing else was allowed here, or no expert listed anything that fits.")
        : this.opinions(entry, piece),
      entry.missed_mass ? h("p", { class: "soft" }, missed) : null,
    ].filter((part) => part !== null);
  }

  /** A column for every expert that was asked. */
  opinions(entry, drawn) {
    const experts = this.palette.names.filter((expert) => expert in entry.weights || expert in (entry.experts ?? {}));
    const widest = Math.max(1, ...Object.values(entry.weights));
    const columns = experts.map((expert) => {
      const weight = entry.weights[expert] ?? 0;
      const share = entry.carriers[expert];
      return h(
        "section",
        { class: `opinion ${this.palette.of(expert)}` },
        h("h3", {}, this.palette.swatch(expert), expert),
        bar("weight", weight / widest, weight.toFixed(2)),
        bar("carried", share ?? 0, share === undefined ? "–" : percent(share)),
        entry.experts?.[expert] ? wishes(entry.experts[expert], drawn) : null,
      );
    });
    const list = h("div", { class: "opinions" }, columns);
    list.style.setProperty("--columns", String(columns.length > 4 ? Math.min(4, Math.ceil(columns.length / 2)) : columns.length));
    return list;
  }
}

function bar(label, share, text) {
  const filled = h("span", { class: "filled" });
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return h("p", { class: "bar" }, h("span", { class: "soft" }, label), h("span", { class: "track" }, filled), h("span", { class: "number" }, text));
}

/** What an expert would have written next, and the drawn token below where it is not among that. */
function wishes({ logprob, top }, drawn) {
  const items = top.map((wish) => wishItem(wish, wish.text === drawn));
  if (logprob !== null && !top.some((wish) => wish.text === drawn)) items.push(wishItem({ text: drawn, logprob }, true, true));
  return h("ol", { "aria-label": "would have written next" }, items);
}

function wishItem({ text, logprob }, isDrawn, isBelow = false) {
  const chance = Math.exp(logprob);
  const item = h(
    "li",
    { class: isBelow ? "drawn below" : isDrawn ? "drawn" : null },
    h("code", {}, visible(text)),
    h("span", { class: "number" }, percent(chance)),
    isDrawn ? h("span", { class: "unseen" }, " drawn") : null,
  );
  item.style.setProperty("--chance", `${chance * 100}%`);
  return item;
}

function inWords(entry, name, facts) {
  if (entry.is_forced) return `${name}, ${facts.join(", ")}, given by the form.`;
  return `${name}, ${facts.join(", ")}. Carried by ${describe(entry.carriers)}. Weights: ${describe(entry.weights)}.`;
}
