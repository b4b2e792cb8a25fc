/** One answer: its tokens, the chart under them, what it came to, and what went wrong. */

import { WeightsChart } from "./chart.js";
import { h } from "./dom.js";
import { percent } from "./palette.js";
import { TokenRow } from "./tokens.js";

const CHART_EVERY_MS = 80;
const MOST_ON_THEIR_WAY = 8; // tokens between the server's word that it steers and the first that shows it
const ENDINGS = {
  stop: "complete",
  length: "cut at the token limit",
  tool_calls: "a call of a tool",
  stopped: "stopped by you",
  failed: "broken off",
};

export class Answer {
  /** `asked` says for people with which preference; `letter` is "A", "B" or null where there is one answer alone. */
  constructor(palette, popover, { asked, letter, onGrow, onAgain }) {
    this.palette = palette;
    this.popover = popover;
    this.onGrow = onGrow;
    this.trace = [];
    this.text = "";
    this.waiting = [];
    this.turn = null;
    this.isScheduled = false;
    this.isDone = false;
    this.chartDrawnAt = 0;
    this.tokens = new TokenRow(palette, {
      onShow: (index, isPicked) => this.show(index, isPicked),
      onLeave: () => this.popover.leave(),
    });
    this.chart = new WeightsChart(palette, {
      onPoint: (index) => this.point(index),
      onPick: (index) => this.tokens.pick(index),
    });
    this.result = h("p", { class: "result" }, "…");
    this.problem = h("div", { class: "problem", role: "alert", hidden: true });
    this.element = h(
      "article",
      { class: "answer running", "aria-label": letter ? `Answer ${letter}` : "Answer", "aria-busy": "true" },
      h(
        "div",
        { class: "asked" },
        letter ? h("span", { class: "letter" }, letter) : null,
        h("span", {}, asked),
        h("button", { type: "button", class: "again", title: "With the sliders as they stand now", onClick: onAgain }, "Ask again"),
      ),
      this.tokens.element,
      this.problem,
      h("div", { class: "under" }, this.chart.element, this.result),
    );
  }

  /** A token has come: `entry` is of the field `trace`. */
  add(entry) {
    this.waiting.push({ ...entry, turn: this.turnBefore(entry) });
    if (this.isScheduled) return;
    this.isScheduled = true;
    requestAnimationFrame((now) => this.flush(now));
  }

  /** Soon another preference counts: `what` says which, and `weights` by which experts. */
  changePreference(what, weights) {
    this.turn = { text: `The preference changed: ${what}`, experts: Object.keys(weights), num: 0 };
  }

  /** The change that this token is the first to follow, if any: tokens that were on their way show the old experts. */
  turnBefore({ carriers }) {
    if (this.turn === null) return null;
    const { text, experts } = this.turn;
    const isOld = experts.length !== Object.keys(carriers).length || experts.some((name) => !(name in carriers));
    this.turn.num += 1;
    if (isOld && this.turn.num < MOST_ON_THEIR_WAY) return null;
    this.turn = null;
    return text;
  }

  /** It is over: `reason` is a finish_reason, "stopped" or "failed". */
  finish(reason) {
    this.isDone = true;
    this.flush(Infinity);
    this.chart.finish();
    this.tokens.finish();
    this.element.classList.remove("running");
    this.element.setAttribute("aria-busy", "false");
    const num = this.trace.length;
    this.tokens.element.setAttribute("aria-label", `Answer of ${num} tokens. The arrow keys walk through them.`);
    this.element.classList.toggle("without-tokens", num === 0);
    this.tell(ENDINGS[reason] ?? reason);
    this.onGrow();
  }

  /** Show `message`; the button that asks again stands above it. */
  fail(message) {
    const title = this.trace.length + this.waiting.length > 0 ? "The answer broke off. " : "No answer. ";
    this.problem.replaceChildren(h("strong", {}, title), message);
    this.problem.hidden = false;
    this.finish("failed");
  }

  flush(now) {
    this.isScheduled = false;
    const entries = this.waiting;
    this.waiting = [];
    for (const entry of entries) {
      if (entry.turn) this.chart.mark(this.chart.num);
      this.chart.add(entry);
      this.trace.push(entry);
      this.text += entry.text;
    }
    this.tokens.append(entries);
    if (now - this.chartDrawnAt > CHART_EVERY_MS && !this.isDone) {
      this.chartDrawnAt = now;
      this.chart.draw();
      this.tell(null);
    }
    if (entries.length > 0) this.onGrow();
  }

  tell(ending) {
    const shares = this.chart.shares();
    const legend = this.palette.names
      .filter((name) => name in shares)
      .map((name) => h("span", { class: "carrier" }, this.palette.swatch(name), `${name} `, h("b", {}, percent(shares[name]))));
    const num = this.trace.length;
    const facts = [`${num} ${num === 1 ? "token" : "tokens"}`, ending].filter((fact) => fact !== null);
    this.result.replaceChildren(...legend, h("span", { class: "facts" }, facts.join(" · ")));
  }

  show(index, isPicked) {
    const isPinned = isPicked || (this.popover.isPinned && this.tokens.hasFocusOn(index));
    if (this.popover.isPinned && !isPinned) return;
    this.point(index);
    this.popover.show(this.tokens.spans[index], this.trace[index], index + 1, {
      isPinned,
      onClose: () => this.point(null),
    });
  }

  point(index) {
    this.chart.point(index);
    this.tokens.light(index);
  }
}
