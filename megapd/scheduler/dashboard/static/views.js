// Tables, the list of runs, and the events. What comes from the service becomes text nodes, never HTML.

import { drawBar, drawn } from "./charts.js";

const at = (id) => document.getElementById(id);
const shows = new WeakMap(); // element -> what it shows, so that an unchanged one keeps its selection and its open parts

export function make(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

export function number(value) {
  if (typeof value !== "number") return "";
  return Number.isInteger(value) ? value.toLocaleString("en") : Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

export function moment(seconds) {
  const when = new Date(seconds * 1000);
  return Object.assign(make("time", when.toLocaleString()), { dateTime: when.toISOString() });
}

export function unchanged(element, shown) {
  const text = JSON.stringify(shown);
  if (shows.get(element) === text) return true;
  shows.set(element, text);
  return false;
}

// rows: arrays of texts or elements, as long as `heads`. shown: what they are made of, to draw only what changed.
export function table(id, heads, rows, shown) {
  const element = at(id);
  element.hidden = rows.length === 0;
  if (unchanged(element, shown)) return;
  const head = make("thead");
  head.append(make("tr"));
  for (const name of heads) head.firstChild.append(Object.assign(make("th", name), { scope: "col" }));
  const body = make("tbody");
  for (const row of rows) {
    const line = make("tr");
    row.forEach((value, place) => {
      const cell = make("td");
      cell.dataset.head = heads[place]; // a phone shows a row as a list of these
      cell.append(value);
      line.append(cell);
    });
    body.append(line);
  }
  element.replaceChildren(head, body);
}

// A tree behind a summary.
export function folded(summary, tree) {
  const made = make("details");
  made.append(make("summary", summary), make("pre", JSON.stringify(tree, null, 1)));
  return made;
}

export function teaching(segments, step) {
  return segments.findLast((segment) => segment.start <= Math.max(step, 0)) ?? null;
}

// Where another checkpoint begins to teach: a new version of the schedule may go on with the same.
export function rotations(segments) {
  return segments.filter((segment, place) => place && segment.checkpoint !== segments[place - 1].checkpoint);
}

export function following(segments, step) {
  return rotations(segments).find((segment) => segment.start > Math.max(step, 0)) ?? null;
}

function where(run, plan) {
  const parts = [run.step < 0 ? `no step yet, of ${number(run.steps)}` : `step ${number(run.step)} of ${number(run.steps)}`];
  if (!plan) return parts[0];
  const present = teaching(plan.segments, run.step);
  const next = following(plan.segments, run.step);
  if (present) parts.push(`taught by ${number(present.checkpoint)}`);
  if (next) parts.push(`${number(next.checkpoint)} from ${number(next.start)}`);
  else if (plan.expected.length) parts.push(`then ${number(plan.expected[0])} when it is ready`);
  if (!present) parts.push(run.schedule_version ? "its schedule cannot be shown" : "no schedule yet");
  return parts.join(" · ");
}

// The list; items stay the same elements, so that focus survives.
export function runList(runs, plans, chosen, choose) {
  const list = at("run-list");
  const present = new Map([...list.children].map((item) => [item.dataset.run, item]));
  const items = runs.map((run) => {
    const item = present.get(run.name) ?? newItem(run.name, choose);
    const [button] = item.children;
    const plan = plans.get(run.name);
    button.setAttribute("aria-current", run.name === chosen ? "true" : "false");
    const segments = plan?.segments ?? [];
    if (!unchanged(button, [run.step, run.steps, run.schedule_version, segments, plan?.expected, plan?.problem])) {
      button.querySelector(".run-where").textContent = where(run, plan);
      drawBar(button.querySelector("svg"), run, segments);
    }
    return item;
  });
  if (items.length !== list.children.length || items.some((item, place) => item !== list.children[place])) {
    const focused = document.activeElement;
    list.replaceChildren(...items);
    if (focused !== document.activeElement && list.contains(focused)) focused.focus();
  }
}

function newItem(name, choose) {
  const item = make("li");
  item.dataset.run = name;
  const button = Object.assign(make("button", undefined, "run"), { type: "button" });
  const bar = drawn("svg", { viewBox: "0 0 1000 12", preserveAspectRatio: "none", class: "bar", "aria-hidden": "true" });
  button.append(make("span", name, "run-name"), make("span", "", "run-where"), bar);
  button.addEventListener("click", () => choose(name));
  item.append(button);
  return item;
}

export function facts(entries) {
  if (unchanged(at("facts"), entries)) return;
  at("facts").replaceChildren(
    ...entries.map(([name, value]) => {
      const pair = make("div");
      pair.append(make("dt", name), make("dd", value));
      return pair;
    }),
  );
}

// age: seconds since the last heartbeat, now.
export function replicaTable(replicas, age) {
  at("replicas-empty").hidden = replicas.length > 0;
  at("replicas-empty").textContent = "None has a lease: students are taught by what they hold or run themselves.";
  // A replica's rates, or its other figures, as one text.
  const told = (replica, rates) =>
    Object.entries(replica.figures)
      .filter(([key]) => key.endsWith("_per_second") === rates)
      .map(([key, value]) => `${number(value)} ${key.replace("_per_second", "/s").replaceAll("_", " ")}`)
      .join(", ");
  const shown = replicas.map((replica) => [replica.id, replica.group, replica.endpoint, replica.state, replica.figures, replica.lease_seconds]);
  const rows = replicas.map((replica) => {
    const meter = make("meter");
    Object.assign(meter, { min: 0, max: replica.lease_seconds, high: replica.lease_seconds / 2, low: 0, optimum: 0 });
    meter.setAttribute("aria-label", `age of the lease of ${replica.id}`);
    const lease = make("span", undefined, "lease");
    lease.append(make("span", "", "lease-age"), meter);
    const standing = make("span", replica.state, `state ${replica.state === "live" ? "good" : "warn"}`);
    return [replica.id, replica.group, replica.endpoint, standing, lease, told(replica, true) || "not told", told(replica, false)];
  });
  table("replicas", ["Replica", "Group", "Endpoint", "State", "Lease age", "Throughput", "Other figures"], rows, shown);
  replicas.forEach((replica, place) => {
    const cell = at("replicas").querySelectorAll(".lease")[place];
    const seconds = age(replica);
    cell.firstChild.textContent = `${seconds.toFixed(seconds < 10 ? 1 : 0)} of ${number(replica.lease_seconds)} s`;
    cell.lastChild.value = Math.min(seconds, replica.lease_seconds);
  });
}

const SAID = {
  run: (b) => `registered for ${number(b.steps)} steps, group ${b.group}`,
  schedule: (b) => `schedule version ${b.version} (${b.policy}) begins at step ${number(b.effective)}, set by ${b.by}${b.note ? `: ${b.note}` : ""}`,
  schedule_applied: (b) => `all ranks take up schedule version ${b.version} at step ${number(b.step)}`,
  decision_applied: (b) => `all ranks take up decision ${b.sequence} at step ${number(b.step)}`,
  decision: (b) => `decision ${b.sequence}: checkpoint ${number(b.checkpoint)} teaches from step ${number(b.effective)}`,
  decision_refused: (b) => `decision ${b.sequence} refused: ${b.detail}`,
  assignment: (b) => `teachers, list ${b.version}: ${b.endpoints.join(", ") || "none"}`,
  replica: (b) => `replica ${b.replica} (${b.group}, ${b.endpoint}) ${b.state}${b.reason ? `: ${b.reason}` : ""}`,
  trajectory: (b) => `trajectory of ${b.of} registered from ${b.location}`,
  checkpoint: (b) => `checkpoint of step ${number(b.step)} registered`,
  verified: (b) => `trajectory verified; ${b.flagged.length ? `flagged: ${b.flagged.join(", ")}` : "nothing flagged"}`,
  accepted: (b) => `flagged checkpoint of step ${number(b.step)} accepted by ${b.by}`,
  name: (b) => `name ${b.name} points to ${String(b.digest).slice(0, 12)}`,
  token_created: (b) => `token ${b.name} made, of role ${b.role}`,
  token_revoked: (b) => `token ${b.name} revoked`,
};

function said(event) {
  try {
    return SAID[event.kind](event.body);
  } catch {
    return `${event.kind} ${JSON.stringify(event.body)}`; // a kind or a form that this page does not know
  }
}

// The newest first. An event that is there stays the same element, so that a screen reader tells the new ones alone.
export function eventList(events, run) {
  const list = at("events");
  const wanted = events.filter((event) => run === null || event.run === run).slice(-200).reverse();
  at("events-empty").hidden = wanted.length > 0;
  at("events-empty").textContent = run === null ? "None yet." : "None of this run among the newest.";
  list.hidden = wanted.length === 0;
  const present = new Map([...list.children].map((item) => [item.dataset.id, item]));
  const kept = new Set(wanted.map((event) => String(event.id)));
  for (const [id, item] of present) if (!kept.has(id)) item.remove();
  let before = list.firstChild;
  for (const event of wanted) {
    if (before?.dataset.id === String(event.id)) {
      before = before.nextSibling;
      continue;
    }
    const item = make("li", undefined, event.kind.endsWith("refused") ? "bad" : "");
    item.dataset.id = event.id;
    item.append(moment(event.created), " ");
    if (event.run !== null) item.append(make("b", event.run), " ");
    item.append(said(event));
    list.insertBefore(item, before);
  }
}
