/** Wires the page together. */

import { get, onKeyNeeded } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId, h } from "./dom.js";
import { Palette } from "./palette.js";
import { TokenPopover } from "./popover.js";
import { PreferencePanel } from "./preference.js";
import { showRun } from "./run.js";

const EXAMPLES = ["How do I fix a bike?", "What is the best way to clean my window?", "Can you help me paint our fence?"];
const root = document.documentElement;
let chat = null; // {conversation, panels()} as soon as the server has said what it has
const isNarrow = matchMedia("(max-width: 820px)");

onKeyNeeded((wasWrong) => {
  const dialog = byId("key-dialog");
  if (wasWrong) byId("key-note").textContent = "The server refused that key. Try another.";
  byId("key").value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? byId("key").value : null), { once: true });
  });
});

byId("retry").addEventListener("click", connect);
byId("theme").addEventListener("click", switchTheme);
byId("colours").addEventListener("click", () => root.classList.toggle("plain", !toggle(byId("colours"))));
nameTheme();
wireQuestion();
connect();

async function connect() {
  byId("banner").hidden = true;
  try {
    const info = await get("mope/info");
    if (byId("panels").childElementCount === 0) build(info);
  } catch (error) {
    showBanner(error);
  }
}

function showBanner(error) {
  byId("banner-text").textContent = error.message;
  byId("banner").hidden = false;
}

function build(info) {
  const palette = new Palette(info.experts);
  const popover = new TokenPopover(palette);
  const conversation = new Conversation(palette, popover, {
    settings: () => ({ temperature: byId("temperature").valueAsNumber }),
    onRunning: showRunning,
    onUnreachable: showBanner,
  });
  const panels = ["A", "B"].map((side) => new PreferencePanel(info, palette, side, (panel) => conversation.steer(panel)));
  const presets = Object.values(info.presets);
  panels.forEach((panel, index) => panel.begin(presets[index] ?? presets[0]));
  byId("panels").append(...panels.map((panel) => panel.element));
  const shown = () => (byId("compare").getAttribute("aria-pressed") === "true" ? panels : panels.slice(0, 1));
  const arrange = () => {
    const isComparing = shown().length > 1;
    panels[1].element.hidden = !isComparing;
    panels[0].letter(isComparing);
    panels[1].letter(true);
    root.classList.toggle("comparing", isComparing);
    for (const panel of panels) panel.fold(isComparing || isNarrow.matches);
  };
  arrange();
  isNarrow.addEventListener("change", arrange);
  byId("compare").addEventListener("click", () => {
    toggle(byId("compare"));
    arrange();
  });
  chat = { conversation, panels: shown };
  wireTemperature();
  if (info.has_run) wireViews();
  byId("examples").append(
    ...EXAMPLES.map((text) => h("button", { type: "button", class: "chip", onClick: () => ask(text) }, text)),
  );
}

function wireQuestion() {
  const field = byId("question");
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(field.value.trim());
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask(field.value.trim());
  });
  byId("stop").addEventListener("click", () => {
    chat?.conversation.stop();
    field.focus();
  });
  byId("fresh").addEventListener("click", () => {
    chat?.conversation.clear();
    field.focus();
  });
}

async function ask(question) {
  if (question === "" || chat === null || chat.conversation.isRunning) return;
  const panels = chat.panels();
  const empty = panels.find((panel) => panel.preference === null);
  if (empty) return empty.tell("All sliders stand at 0: move one of them up, then ask.");
  const field = byId("question");
  field.value = "";
  const isAnswered = await chat.conversation.ask(question, panels);
  // Nothing that was typed is lost, neither the question nor what has been written since.
  if (!isAnswered && field.value === "") field.value = question;
}

function wireTemperature() {
  const slider = byId("temperature");
  const show = () => {
    byId("temperature-shown").textContent = slider.valueAsNumber.toFixed(1);
    slider.style.setProperty("--filled", `${slider.valueAsNumber * 50}%`);
  };
  slider.addEventListener("input", show);
  show();
}

function wireViews() {
  const views = { chat: byId("chat"), run: byId("run") };
  byId("views").hidden = false;
  for (const chosen of Object.keys(views)) {
    byId(`view-${chosen}`).addEventListener("click", () => {
      for (const [name, view] of Object.entries(views)) {
        view.hidden = name !== chosen;
        byId(`view-${name}`).setAttribute("aria-pressed", String(name === chosen));
      }
      root.classList.toggle("training", chosen === "run");
      if (chosen === "run") showRun(views.run).catch(showBanner);
    });
  }
}

function showRunning(isRunning) {
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  if (hadFocus) byId(isRunning ? "stop" : "question").focus();
  root.classList.toggle("answering", isRunning);
}

function toggle(button) {
  const isOn = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(isOn));
  return isOn;
}

function isDark() {
  return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function switchTheme() {
  root.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem("mope-theme", root.dataset.theme);
  nameTheme();
}

function nameTheme() {
  byId("theme").setAttribute("aria-label", isDark() ? "Light theme" : "Dark theme");
}
