/** What a training run tells of itself: small line charts, and the evaluation's report. */

import { get, hasKey } from "./api.js";
import { h, s } from "./dom.js";

/** Columns of metrics.jsonl in the order in which one wants to know them; others follow when unfolded. */
const COLUMNS = {
  reward: "Reward: mean win probability",
  loss: "Loss",
  sign_align: "Sign alignment",
  approx_kl: "Divergence from the policy before (KL)",
  weights_entropy: "Entropy of the weights",
  num_tokens: "Tokens per answer",
  effective_samples: "Effective samples",
  length_bias: "Correlation of reward and length",
};
const HIDDEN = new Set(["step", "reward_sem"]);
const WIDTH = 320;
const HEIGHT = 120;

/** Fill the view; raises RequestFailed. */
export async function showRun(view) {
  const run = await get("mope/run");
  const rows = run.metrics;
  const numeric = [...new Set(rows.flatMap((row) => Object.keys(row).filter((name) => typeof row[name] === "number")))];
  const known = Object.keys(COLUMNS).filter((name) => numeric.includes(name));
  const other = numeric.filter((name) => !known.includes(name) && !HIDDEN.has(name));
  const charts = [];
  const chartsOf = (names) => h("div", { class: "run-charts" }, names.map((name) => lineChart(rows, name, charts)));
  view.replaceChildren(
    h("h2", {}, "Training run ", h("code", {}, run.name)),
    rows.length > 0
      ? h("p", { class: "soft" }, `${rows.length} rows, up to step ${rows.at(-1).step}. Rest on a chart to read all of them at one step.`)
      : h("p", { class: "soft" }, "This run has no metrics yet."),
    chartsOf(known),
    other.length > 0 ? h("details", {}, h("summary", {}, `${other.length} more columns`), chartsOf(other)) : "",
    run.has_report ? report() : "",
  );
}

/** One column over the steps. Pointing at one of `charts` points at the same step in all. */
function lineChart(rows, name, charts) {
  const points = rows.filter((row) => typeof row[name] === "number");
  const errorOf = (row) => (name === "reward" ? (row.reward_sem ?? 0) : 0);
  const [lowest, highest] = range(points.flatMap((row) => [row[name] - errorOf(row), row[name] + errorOf(row)]));
  const [first, last] = range(points.map((row) => row.step));
  const x = (row) => ((row.step - first) / (last - first)) * WIDTH;
  const y = (value) => HEIGHT - ((value - lowest) / (highest - lowest)) * HEIGHT;
  const path = (value) => points.map((row, i) => `${i ? "L" : "M"}${x(row).toFixed(1)} ${y(value(row)).toFixed(1)}`).join("");
  const upper = path((row) => row[name] + errorOf(row));
  const lower = [...points].reverse().map((row) => `L${x(row).toFixed(1)} ${y(row[name] - errorOf(row)).toFixed(1)}`).join("");
  const cursor = s("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const value = h("span", { class: "number" }, shown(points.at(-1)?.[name]));
  const svg = s(
    "svg",
    { viewBox: `-4 -6 ${WIDTH + 8} ${HEIGHT + 12}`, role: "img", "aria-label": summary(points, name) },
    name === "reward" ? s("path", { class: "band", d: `${upper}${lower}Z` }) : null,
    s("path", { class: "line", d: path((row) => row[name]) }),
    cursor,
  );
  const point = (step) => {
    const row = step === null ? points.at(-1) : points.find((found) => found.step >= step);
    value.textContent = shown(row?.[name]);
    cursor.setAttribute("visibility", step === null || !row ? "hidden" : "visible");
    if (row) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(row));
  };
  charts.push(point);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const step = Math.round(first + ((event.clientX - box.left) / box.width) * (last - first));
    charts.forEach((tell) => tell(Math.max(first, Math.min(last, step))));
  });
  svg.addEventListener("pointerleave", () => charts.forEach((tell) => tell(null)));
  return h(
    "figure",
    { class: name === "reward" ? "run-chart first" : "run-chart" },
    h("figcaption", {}, h("span", {}, COLUMNS[name] ?? name.replaceAll("_", " ")), value),
    svg,
    h("div", { class: "ends soft" }, h("span", {}, `step ${first}`), h("span", {}, `${shown(lowest)} to ${shown(highest)}`), h("span", {}, `step ${last}`)),
  );
}

function report() {
  const heading = h("h2", {}, "Evaluation");
  // A frame cannot send the key, so the report comes as a file then.
  if (hasKey()) return h("section", {}, heading, h("button", { type: "button", onClick: download }, "Download report.html"));
  return h(
    "section",
    {},
    heading,
    h("p", {}, h("a", { href: "mope/run/report", target: "_blank", rel: "noopener" }, "Open the report in a tab of its own")),
    h("iframe", { src: "mope/run/report", sandbox: "", title: "The evaluation's report", loading: "lazy" }),
  );
}

async function download() {
  const url = URL.createObjectURL(new Blob([await get("mope/run/report", "text")], { type: "text/html" }));
  h("a", { href: url, download: "report.html" }).click();
  URL.revokeObjectURL(url);
}

function range(values) {
  const [lowest, highest] = [Math.min(...values), Math.max(...values)];
  return lowest < highest ? [lowest, highest] : [lowest - 0.5, highest + 0.5];
}

function shown(value) {
  if (value === undefined || !Number.isFinite(value)) return "–";
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)));
}

function summary(points, name) {
  if (points.length === 0) return `${name}: no values`;
  const values = points.map((row) => row[name]);
  const [lowest, highest] = range(values);
  return `${name} from ${shown(values[0])} to ${shown(values.at(-1))}, between ${shown(lowest)} and ${shown(highest)}`;
}
