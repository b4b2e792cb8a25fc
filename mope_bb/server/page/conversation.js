/** Questions and answers, one or two beside each other; what runs can be steered and stopped. */

import { Answer } from "./answer.js";
import { post, streamChunks } from "./api.js";
import { byId, h } from "./dom.js";

const STEER_EVERY_MS = 150;
const NEAR_END_PX = 80;

export class Conversation {
  /** `settings()` gives {temperature}; `onRunning(is)` when answers begin and when all have ended. */
  constructor(palette, popover, { settings, onRunning, onUnreachable }) {
    this.palette = palette;
    this.popover = popover;
    this.settings = settings;
    this.onRunning = onRunning;
    this.onUnreachable = onUnreachable;
    this.turns = [];
    this.open = new Map(); // by side: what runs
    this.box = byId("conversation");
    this.list = byId("turns");
  }

  get isRunning() {
    return this.open.size > 0;
  }

  /** Ask every panel; resolves when all answers have ended, to whether any of them has a token. */
  async ask(question, panels) {
    this.forgetFailed();
    const turn = { question, answers: new Map() };
    turn.row = h("div", { class: panels.length > 1 ? "answers two" : "answers" });
    turn.element = h("li", { class: "exchange" }, h("p", { class: "question" }, question), turn.row);
    this.turns.push(turn);
    byId("empty").hidden = true;
    this.list.append(turn.element);
    await Promise.all(panels.map((panel) => this.run(turn, panel, panels.length > 1)));
    announce(turn);
    return [...turn.answers.values()].some((answer) => answer.trace.length > 0);
  }

  /** The preference of `panel` has moved: its running answer goes on with it. */
  steer(panel) {
    const running = this.open.get(panel.side);
    if (!running) return;
    running.isMoved = true;
    if (!running.isSteering) this.keepSteering(running, panel);
  }

  stop() {
    for (const running of this.open.values()) running.abort.abort();
  }

  clear() {
    this.stop();
    this.open.clear();
    this.onRunning(false);
    this.popover.close();
    this.turns = [];
    this.list.replaceChildren();
    byId("empty").hidden = false;
  }

  async run(turn, panel, isOneOfTwo) {
    const answer = new Answer(this.palette, this.popover, {
      asked: `${panel.description} · ${panel.merge}`,
      letter: isOneOfTwo ? panel.side : null,
      onGrow: () => this.stayAtEnd(),
      onAgain: () => this.again(turn, panel, isOneOfTwo),
    });
    const running = { answer, abort: new AbortController(), id: null, isMoved: false, isSteering: false };
    const messages = this.messages(turn, panel.side);
    const before = turn.answers.get(panel.side);
    turn.answers.set(panel.side, answer);
    if (before) before.element.replaceWith(answer.element);
    else turn.row.append(answer.element);
    this.begin(panel.side, running);
    this.box.scrollTop = this.box.scrollHeight;
    try {
      answer.finish(await this.receive(running, panel, messages));
    } catch (error) {
      if (running.abort.signal.aborted) answer.finish("stopped");
      else {
        if (error.status === 0) this.onUnreachable(error);
        answer.fail(error.message);
      }
    } finally {
      this.end(panel.side, running);
    }
  }

  async again(turn, panel, isOneOfTwo) {
    if (this.isRunning || panel.preference === null) return;
    await this.run(turn, panel, isOneOfTwo);
    announce(turn);
  }

  async receive(running, panel, messages) {
    const body = {
      model: "mope",
      messages,
      preference: panel.preference,
      merge: panel.merge,
      temperature: this.settings().temperature,
      stream: true,
      trace: "experts",
    };
    let reason = "stop";
    for await (const chunk of streamChunks("v1/chat/completions", body, running.abort.signal)) {
      if (chunk.mope?.answer_id && running.id === null) {
        running.id = chunk.mope.answer_id;
        if (running.isMoved) this.steer(panel);
      }
      const choice = chunk.choices[0];
      for (const entry of choice?.trace ?? []) running.answer.add(entry);
      reason = choice?.finish_reason ?? reason;
    }
    return reason;
  }

  /** One request at a time, so that the last position is the one that counts in the end. */
  async keepSteering(running, panel) {
    if (running.id === null) return; // the first chunk calls again
    running.isSteering = true;
    while (running.isMoved && this.open.get(panel.side) === running) {
      running.isMoved = false;
      const pause = new Promise((resolve) => setTimeout(resolve, STEER_EVERY_MS));
      try {
        const { description, preference } = panel;
        const path = `v1/chat/completions/${encodeURIComponent(running.id)}/preference`;
        const { weights } = await post(path, { preference });
        running.answer.changePreference(description, weights);
        panel.tell("");
      } catch (error) {
        // 404: the answer has ended in the meantime, and the next one begins with this preference.
        if (error.status !== 404) panel.tell(error.message);
      }
      await pause;
    }
    running.isSteering = false;
  }

  /** What has been said before `turn`, as `side` has heard it. */
  messages(turn, side) {
    const found = [];
    for (const { question, answers } of this.turns.slice(0, this.turns.indexOf(turn))) {
      const answer = answers.get(side) ?? [...answers.values()][0];
      if (answer.text === "") continue;
      found.push({ role: "user", content: question }, { role: "assistant", content: answer.text });
    }
    return [...found, { role: "user", content: turn.question }];
  }

  /** A question without any answer would only stand in the way of the next. */
  forgetFailed() {
    const last = this.turns.at(-1);
    if (last && [...last.answers.values()].every((answer) => answer.trace.length === 0)) {
      last.element.remove();
      this.turns.pop();
    }
  }

  begin(side, running) {
    this.open.set(side, running);
    this.onRunning(true);
  }

  end(side, running) {
    if (this.open.get(side) === running) this.open.delete(side);
    if (!this.isRunning) this.onRunning(false);
  }

  stayAtEnd() {
    const { scrollTop, clientHeight, scrollHeight } = this.box;
    // Whoever has scrolled up to read stays there.
    if (scrollHeight - scrollTop - clientHeight < NEAR_END_PX) this.box.scrollTop = scrollHeight;
  }
}

function announce(turn) {
  const said = [...turn.answers].map(([side, answer]) =>
    turn.answers.size > 1 ? `Answer ${side}: ${answer.text}` : `Answer: ${answer.text}`,
  );
  byId("announce").textContent = said.join(" ");
}
