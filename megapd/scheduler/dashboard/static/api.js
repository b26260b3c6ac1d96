// Requests to the service, its event stream, and the token, which lives in sessionStorage and leaves it in one header alone.

const KEY = "megapd-token";
const ANSWER_MS = 15000;
const SILENT_MS = 40000; // the service says something every 15 s, so a stream that is silent for longer is dead
const POLL_MS = 3000;
const AGAIN_MS = 15000; // between attempts at a stream while events are polled

// The service said no. status: of HTTP; current: what is there instead (409).
export class Refused extends Error {
  constructor(status, detail, current) {
    super(detail);
    this.status = status;
    this.current = current;
  }
}

// The service did not answer, or is not able to (5xx).
export class Away extends Error {}

export function token() {
  return sessionStorage.getItem(KEY) || "";
}

export function setToken(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

function headers() {
  return token() ? { Authorization: `Bearer ${token()}` } : {};
}

async function refusal(response) {
  const told = (await response.json().catch(() => null)) ?? {}; // of what is not this service's own, the status says enough
  const detail = typeof told.detail === "string" ? told.detail : `${response.status} ${response.statusText}`;
  return response.status >= 500 ? new Away(detail) : new Refused(response.status, detail, told.current);
}

export async function ask(path, body) {
  const given = { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) };
  if (body !== undefined) {
    Object.assign(given, { method: "POST", body: JSON.stringify(body) });
    given.headers["Content-Type"] = "application/json";
  }
  const away = (told) => Promise.reject(new Away(told));
  const response = await fetch(path, given).catch((error) =>
    away(error.name === "TimeoutError" ? `no answer within ${ANSWER_MS / 1000} s` : "the service cannot be reached"),
  );
  if (!response.ok) throw await refusal(response);
  return response.json().catch(() => away("the answer was cut off"));
}

// Everything of a list that comes in pages; `key` names the field that the next page begins after.
export async function askAll(path, key, limit, first) {
  const found = [];
  let after = first;
  for (;;) {
    const page = await ask(`${path}?limit=${limit}&after=${encodeURIComponent(after)}`);
    found.push(...page);
    if (page.length < limit) return found;
    after = page[page.length - 1][key];
  }
}

function wait(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

// Reads one stream until it ends. EventSource would do the same, but sends no headers, and a token in the address ends up in logs.
async function readStream(after, signal, heard) {
  const stop = new AbortController();
  const end = () => stop.abort();
  signal.addEventListener("abort", end, { once: true });
  let timer = setTimeout(end, SILENT_MS);
  try {
    const response = await fetch(`/v1/stream?after=${after}`, { headers: headers(), cache: "no-store", signal: stop.signal });
    if (!response.ok) throw await refusal(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(end, SILENT_MS);
      const messages = (text + value).split("\n\n");
      text = messages.pop();
      heard(messages.map(parse).filter(Boolean));
    }
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", end);
  }
}

function parse(message) {
  const fields = {};
  for (const line of message.split("\n")) {
    const colon = line.indexOf(":");
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
  }
  if (fields.data === undefined) return null;
  return fields.event === "reset" ? { kind: "reset", id: Number(fields.id) } : JSON.parse(fields.data);
}

// Calls told(events) as events happen, those after `after`, until `signal` aborts. mode("stream" | "poll" | "away") says how.
export async function follow(after, signal, told, mode) {
  let last = after;
  let pollUntil = 0;
  const take = (events) => {
    for (const event of events) last = event.kind === "reset" ? event.id : Math.max(last, event.id);
    if (events.length) told(events);
  };
  while (!signal.aborted) {
    try {
      if (Date.now() >= pollUntil) {
        await readStream(last, signal, (events) => (mode("stream"), take(events)));
        pollUntil = Date.now() + 1000; // it ended without an error: a restart, most likely
      }
    } catch {
      pollUntil = Date.now() + AGAIN_MS;
    }
    if (signal.aborted) return;
    try {
      take(await ask(`/v1/events?after=${last}&limit=500`));
      mode("poll");
    } catch {
      mode("away");
      pollUntil = 0; // when it is back, its stream may be as well
    }
    await wait(POLL_MS, signal);
  }
}
