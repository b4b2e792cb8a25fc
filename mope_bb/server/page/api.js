/** The server's HTTP interface. Every failure is a RequestFailed whose message says what to do. */

import { eventData } from "./sse.js";

const KEY = "mope-key";

export class RequestFailed extends Error {
  /** `status` is 0 where nobody answered. */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let askForKey = async () => null;
let asking = null;

/** `ask(wasWrong)` is called where the server wants a key; it resolves to one, or to null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** Whether requests carry a key: then a plain link to the server would be refused. */
export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/** GET; JSON, or text with `as` "text". */
export async function get(path, as = "json") {
  return (await request(path, {}))[as]();
}

/** POST of JSON; resolves to the answer's JSON. */
export async function post(path, body, signal) {
  return (await request(path, posted(body, signal))).json();
}

/** POST that is answered by a stream: yields every chunk. Raises RequestFailed where the stream breaks off. */
export async function* streamChunks(path, body, signal) {
  const response = await request(path, posted(body, signal));
  const events = eventData(response.body);
  try {
    for (let next = await readNext(events); !next.done; next = await readNext(events)) {
      if (next.value === "[DONE]") return;
      const chunk = JSON.parse(next.value);
      if (chunk.error) throw new RequestFailed(chunk.error.message, response.status);
      yield chunk;
    }
  } finally {
    await events.return();
  }
  throw brokenOff();
}

async function readNext(events) {
  try {
    return await events.next();
  } catch (error) {
    throw error.name === "AbortError" ? error : brokenOff();
  }
}

function brokenOff() {
  return new RequestFailed("The connection was lost in the middle of the answer. Ask again to have it whole.", 0);
}

function posted(body, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

async function request(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key === null ? options.headers : { ...options.headers, Authorization: `Bearer ${key}` };
    const response = await reach(path, { ...options, headers });
    if (response.ok) return response;
    const failure = await failureOf(response);
    if (failure.status !== 401 || !(await haveOtherKey(key))) throw failure;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestFailed(
      `The server at ${location.host} cannot be reached. See whether \`mope-bb serve\` still runs, then try again.`,
      0,
    );
  }
}

async function failureOf(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  return new RequestFailed(message, response.status);
}

async function haveOtherKey(refused) {
  // Two requests at the same time ask once.
  if (sessionStorage.getItem(KEY) !== refused) return true;
  asking ??= askForKey(refused !== null).finally(() => (asking = null));
  const key = await asking;
  if (key === null) return false;
  sessionStorage.setItem(KEY, key);
  return true;
}
