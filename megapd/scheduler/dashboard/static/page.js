// The page: what it knows, when it asks for more, and what it shows of it.

import { Away, Refused, ask, askAll, follow, token } from "./api.js";
import { drawStudent, drawTeacher, drawTimeline } from "./charts.js";
import { openToken, setUpControl, setUpToken } from "./dialogs.js";
import { eventList, facts, folded, following, make, moment, number, replicaTable, rotations, runList, table, teaching, unchanged } from "./views.js";

const REFRESH_MS = 3000;
const LONGEST_MS = 15000; // between attempts while the service is away
const SETTLE_MS = 300; // events come in bursts; what they made stale is asked for once
const SHOWN = 50; // runs, until more are asked for
const KEPT = 500; // events
const POINTS = 3000; // of a curve, before it is thinned again by the service
const PREFERRED = ["accuracy", "loss", "divergence", "probe_loss"];

const NO_PLAN = { segments: [], expected: [], omitted: 0, problem: "" };

const at = (id) => document.getElementById(id);
const enc = encodeURIComponent;

const state = {
  caller: null,
  runs: [],
  plans: new Map(), // run -> its timeline
  stale: new Set(), // runs whose plan is to be asked for
  chosen: null,
  detail: null, // of the chosen run: { name, points, checkpoints, versions, decisions }
  detailStale: false,
  replicas: [],
  replicasAt: 0,
  events: [],
  all: false,
  metric: { student: null, teacher: null },
  paces: new Map(), // run -> { step, reported, pace }, student steps a second
  mode: "away",
  failures: 0,
  heard: 0,
};

let session = null; // of everything that began with the present token: { stop, timer, busy, pending }

// ------------------------------------------------------------------------------------------------------------- connection

function banner(text, button) {
  const element = at("banner");
  if (unchanged(element, [text, button?.label])) return;
  element.hidden = !text;
  element.replaceChildren(text);
  if (!button) return;
  const made = Object.assign(make("button", button.label), { type: "button" });
  made.addEventListener("click", button.act);
  element.append(" ", made);
}

function showLink() {
  const texts = { stream: "Live", poll: "Live, asked for every 3 s", away: "Connecting", refused: "Token needed" };
  const text = state.failures ? "Service away" : texts[state.mode];
  const element = at("link");
  if (element.textContent !== text) element.textContent = text;
  element.dataset.mode = state.failures ? "away" : state.mode;
}

// Begin anew, e.g. with another token.
function begin() {
  session?.stop.abort();
  session = { stop: new AbortController(), timer: 0, busy: false, pending: false };
  Object.assign(state, { failures: 0, heard: 0, mode: "away" });
  forget("Loading");
  cycle(session);
}

function forget(told) {
  Object.assign(state, { caller: null, runs: [], detail: null, replicas: [], events: [] });
  for (const known of [state.plans, state.stale, state.paces]) known.clear();
  at("who").textContent = "";
  at("filter-field").hidden = at("runs-more").hidden = true;
  for (const id of ["runs", "replicas", "events"]) {
    at(`${id}-empty`).hidden = false;
    at(`${id}-empty`).textContent = told;
  }
  at("replicas").hidden = at("events").hidden = true;
  runList([], state.plans, null, choose);
  showDetail();
}

async function cycle(mine) {
  mine.busy = true;
  mine.pending = false;
  let again = REFRESH_MS;
  try {
    if (!document.hidden || state.caller === null) await refresh(mine.stop.signal);
    if (mine.stop.signal.aborted) return;
    if (state.failures) state.detailStale = true; // what happened meanwhile was not heard
    state.failures = 0;
    banner("");
  } catch (error) {
    if (mine.stop.signal.aborted) return;
    again = failed(error);
  } finally {
    mine.busy = false;
  }
  showLink();
  render();
  if (again) mine.timer = setTimeout(() => cycle(mine), mine.pending ? 0 : again);
}

// What is shown stays, marked as old. Returns when to try again, 0: when there is another token.
function failed(error) {
  if (error instanceof Refused && error.status === 401) {
    session.stop.abort();
    state.failures = 0;
    state.mode = "refused";
    const told = token() ? "The service does not know this token; it may have been revoked." : "This service wants a token.";
    banner(told, { label: "Enter a token", act: () => openToken("") });
    forget("Nothing is shown without a token.");
    return 0;
  }
  if (!(error instanceof Refused || error instanceof Away)) {
    banner(`The page has a fault: ${error.message}. Reload it.`);
    throw error;
  }
  state.failures += 1;
  const since = state.heard ? ` What is shown is of ${new Date(state.heard).toLocaleTimeString()}.` : "";
  banner(`The service is away (${error.message}); trying again.${since}`, { label: "Try now", act: retry });
  if (!state.heard) forget("Nothing was heard from the service yet.");
  return Math.min(REFRESH_MS * 2 ** (state.failures - 1), LONGEST_MS);
}

// Ask for what is stale now, or as soon as the present round is done.
function retry() {
  if (session.stop.signal.aborted) return;
  session.pending = true;
  if (session.busy) return;
  clearTimeout(session.timer);
  cycle(session);
}

async function refresh(signal) {
  if (state.caller === null) {
    const caller = await ask("/v1/page/caller");
    const events = await ask("/v1/page/events?limit=100");
    if (signal.aborted) return;
    Object.assign(state, { caller, events });
    at("who").textContent = token() ? `${caller.name}, role ${caller.role}` : "no tokens: everybody here is admin";
    follow(events.at(-1)?.id ?? 0, signal, heard, (mode) => {
      state.mode = mode;
      showLink();
    });
  }
  const [runs, replicas] = await Promise.all([askAll("/v1/runs", "name", 1000, ""), ask("/v1/replicas")]);
  if (signal.aborted) return;
  runs.sort((a, b) => (b.reported ?? b.created) - (a.reported ?? a.created) || (a.name < b.name ? -1 : 1));
  runs.forEach(measure);
  if (state.runs.length && state.runs.length === runs.length) keepOrder(runs);
  Object.assign(state, { runs, replicas, replicasAt: performance.now(), heard: Date.now() });
  if (state.chosen === null && runs.length) state.chosen = (runs.find((run) => location.hash === `#${enc(run.name)}`) ?? runs[0]).name;
  await refreshPlans(signal);
  await refreshDetail(signal);
}

// The order changes when runs come and go, not with every report: a list that moves cannot be clicked.
function keepOrder(runs) {
  const places = new Map(state.runs.map((run, place) => [run.name, place]));
  if (runs.every((run) => places.has(run.name))) runs.sort((a, b) => places.get(a.name) - places.get(b.name));
}

function measure(run) {
  const before = state.paces.get(run.name);
  if (before && before.reported === run.reported) return;
  const seconds = before ? run.reported - before.reported : 0;
  const pace = seconds > 0 && run.step > before.step ? (run.step - before.step) / seconds : (before?.pace ?? 0);
  state.paces.set(run.name, { step: run.step, reported: run.reported, pace });
}

async function refreshPlans(signal) {
  const shown = [...new Set([...listed(), chosenRun()])];
  const wanted = shown.filter((run) => run && (!state.plans.has(run.name) || state.stale.has(run.name)));
  while (wanted.length) {
    const some = wanted.splice(0, 4);
    for (const run of some) state.stale.delete(run.name);
    const found = await Promise.all(some.map((run) => ask(`/v1/page/runs/${enc(run.name)}/timeline`).catch(refusedAs((problem) => ({ ...NO_PLAN, problem })))));
    if (signal.aborted) return;
    some.forEach((run, place) => state.plans.set(run.name, found[place]));
  }
}

// What stands for a refused answer; without a token, and without a service, there is none.
function refusedAs(made) {
  return (error) => {
    if (!(error instanceof Refused) || error.status === 401) throw error;
    return made(error.message);
  };
}

const orNone = refusedAs(() => []);

async function refreshDetail(signal) {
  const run = chosenRun();
  if (!run) return;
  const path = `/v1/runs/${enc(run.name)}`;
  if (state.detail?.name !== run.name || state.detailStale) {
    state.detailStale = false;
    const [points, checkpoints, versions, decisions] = await Promise.all([
      ask(`/v1/page/runs/${enc(run.name)}/curve`).catch(orNone),
      run.trajectory ? askAll(`/v1/page/trajectories/${run.trajectory}/curve`, "step", 500, -1) : [],
      askAll(`${path}/schedules`, "version", 1000, 0).catch(orNone),
      ask(`${path}/decisions?limit=200&after=${Math.max(run.decisions - 201, -1)}`).catch(orNone),
    ]);
    if (signal.aborted || state.chosen !== run.name) return;
    state.detail = { name: run.name, points, checkpoints, versions, decisions };
    return;
  }
  const { points } = state.detail;
  const last = points.at(-1)?.step ?? -1;
  if (run.step <= last) return;
  const more = await ask(`${path}/reports?after=${last}`).catch(orNone);
  if (signal.aborted || state.detail?.name !== run.name) return;
  points.push(...more.map(({ step, metrics }) => ({ step, metrics })));
  if (points.length > POINTS) state.detailStale = true;
}

// ----------------------------------------------------------------------------------------------------------------- events

let settling = 0;

function heard(events) {
  for (const event of events) {
    if (event.kind === "reset") {
      state.detailStale = true;
      for (const run of state.runs) state.stale.add(run.name);
      continue;
    }
    if (event.id <= state.events.at(-1)?.id) continue;
    state.events.push(event);
    const kind = event.kind;
    if (/^(run|schedule|schedule_applied|decision|decision_applied|decision_refused)$/.test(kind)) {
      state.stale.add(event.run);
      if (event.run === state.chosen) state.detailStale = true;
    } else if (/^(checkpoint|verified|accepted)$/.test(kind)) {
      for (const run of state.runs) if (run.trajectory && run.trajectory === event.body.trajectory) state.stale.add(run.name);
      if (kind === "accepted" || chosenRun()?.trajectory === event.body.trajectory) state.detailStale = true;
    }
  }
  state.events.splice(0, state.events.length - KEPT);
  showEvents();
  clearTimeout(settling);
  settling = setTimeout(retry, SETTLE_MS);
}

function showEvents() {
  if (state.caller) eventList(state.events, at("events-mine").checked ? state.chosen : null);
}

// ---------------------------------------------------------------------------------------------------------------- showing

function chosenRun() {
  return state.runs.find((run) => run.name === state.chosen);
}

function matching() {
  const wanted = at("filter").value.trim().toLowerCase();
  return state.runs.filter((run) => run.name.toLowerCase().includes(wanted));
}

function listed() {
  return state.all ? matching() : matching().slice(0, SHOWN);
}

function render() {
  if (!state.caller) return;
  showList();
  showDetail();
  showReplicas();
  showEvents();
}

function showReplicas() {
  const since = performance.now();
  replicaTable(state.replicas, (replica) => replica.age + (since - state.replicasAt) / 1000);
}

function showList() {
  const wanted = listed();
  const count = matching().length;
  at("filter-field").hidden = state.runs.length < 2;
  at("runs-empty").hidden = wanted.length > 0;
  const none = "No run has registered yet. One does with scheduler.url in its configuration.";
  at("runs-empty").textContent = state.runs.length ? "No run's name holds that." : none;
  at("runs-more").hidden = wanted.length === count;
  at("runs-more").textContent = `Show all ${count}`;
  runList(wanted, state.plans, state.chosen, choose);
}

function choose(name) {
  state.chosen = name;
  history.replaceState(null, "", `#${enc(name)}`);
  render();
  retry();
  if (matchMedia("(max-width: 700px)").matches) at("detail").focus(); // it stands below the list there
}

function showDetail() {
  const run = chosenRun();
  at("detail-body").hidden = !run;
  at("detail-empty").hidden = Boolean(run);
  const title = run?.name ?? "No run chosen";
  if (at("detail-title").textContent !== title) at("detail-title").textContent = title;
  if (!run) return;
  const plan = state.plans.get(run.name) ?? NO_PLAN;
  showFacts(run, plan);
  showControls(run);
  const detail = state.detail?.name === run.name ? state.detail : null;
  showTimeline(run, plan, detail?.checkpoints ?? []);
  if (!detail) return;
  showCurve("student", detail.points, "No report yet.", (metric) => drawStudent(at("student"), run, detail.points, metric, plan.segments), run, plan);
  const none = run.trajectory ? "Its checkpoints hold no metrics." : "No trajectory is registered for this run.";
  showCurve("teacher", detail.checkpoints, none, (metric) => drawTeacher(at("teacher"), run, detail.checkpoints, metric, plan.segments), run, plan);
  showHistory(detail);
}

function showFacts(run, plan) {
  const present = teaching(plan.segments, run.step);
  const next = following(plan.segments, run.step);
  const pace = state.paces.get(run.name)?.pace ?? 0;
  facts([
    ["Student's step", run.step < 0 ? `none of ${number(run.steps)}` : `${number(run.step)} of ${number(run.steps)}`],
    ["Taught by teacher's step", present ? number(present.checkpoint) : "unknown"],
    ["Next rotation", next ? `${number(next.checkpoint)} at step ${number(next.start)}` : plan.expected.length ? "when the student is ready" : "none"],
    ["Policy", present ? `${present.policy}, version ${present.version}` : run.schedule_version ? `version ${run.schedule_version}` : "none"],
    ["Pace", pace ? `${number(pace)} steps/s` : "not known yet"],
    ["Last report", run.reported === null ? "none" : new Date(run.reported * 1000).toLocaleTimeString()],
    ["Replicas", run.endpoints.length ? String(run.endpoints.length) : `none in group ${run.group}`],
  ]);
}

function showControls(run) {
  const over = run.step >= run.steps - 1;
  for (const button of document.querySelectorAll("[data-action]")) button.disabled = !run.schedule_version || over;
  const role = state.caller?.role;
  let note = "";
  if (!run.schedule_version) note = "This run has no schedule yet.";
  else if (over) note = "This run is at its end.";
  else if (role && role !== "admin") note = `Your token is of role ${role}; the service takes these from an admin alone.`;
  at("controls-note").textContent = note;
}

function showTimeline(run, plan, checkpoints) {
  const { segments } = plan;
  const turns = rotations(segments);
  const past = turns.filter((segment) => segment.start <= Math.max(run.step, 0)).length;
  const notes = [];
  if (segments.length) notes.push(`Rotations past: ${past}, to come: ${turns.length - past}.`);
  else if (!plan.problem) notes.push("No schedule yet.");
  if (plan.expected.length) notes.push(`When the student is ready: ${plan.expected.slice(0, 8).map(number).join(", ")}.`);
  if (plan.omitted) notes.push(`${number(plan.omitted)} farther away are not shown.`);
  if (plan.problem) notes.push(plan.problem);
  at("timeline-note").textContent = notes.join(" ");
  at("timeline").hidden = segments.length === 0;
  const flags = checkpoints.map((checkpoint) => [checkpoint.step, checkpoint.flags.length]);
  if (segments.length && !unchanged(at("timeline"), [run.name, run.step, run.steps, segments, flags])) drawTimeline(at("timeline"), run, segments, checkpoints);
  const rows = segments.map((s) => [number(s.start), number(s.end), number(s.checkpoint), `${s.version} (${s.policy})`, s.start > run.step ? "to come" : s.end > run.step ? "teaches" : "past"]);
  table("rotations", ["From student step", "to before", "Teacher's step", "Version", "State"], rows, rows);
}

function showCurve(which, points, none, draw, run, plan) {
  const names = [...new Set(points.flatMap((point) => Object.keys(point.metrics)))].sort();
  const select = at(`${which}-metric`);
  if (!unchanged(select, names)) {
    const wanted = [state.metric[which], ...PREFERRED].find((name) => names.includes(name)) ?? names[0];
    select.replaceChildren(...names.map((name) => new Option(name, name, false, name === wanted)));
  }
  select.parentElement.hidden = at(which).hidden = names.length === 0;
  at(`${which}-note`).textContent = names.length ? summary(points, select.value) : none;
  if (names.length && !unchanged(at(which), [run.name, select.value, points.length, points.at(-1), run.step, plan.segments])) draw(select.value);
}

function summary(points, metric) {
  const last = points.findLast((point) => metric in point.metrics);
  return `${metric} at step ${number(last.step)}: ${number(last.metrics[metric])}`;
}

function showHistory(detail) {
  const versions = detail.versions.toReversed();
  const rows = versions.map((v) => [
    String(v.version),
    folded(v.document.policy, v.document),
    number(v.effective),
    v.applied === null ? "not yet" : number(v.applied),
    v.author,
    v.note,
    moment(v.created),
  ]);
  table("versions", ["Version", "Schedule", "Effective from step", "Taken up at", "By", "Note", "Set"], rows, versions);
  const decisions = detail.decisions.toReversed();
  at("decisions-empty").hidden = decisions.length > 0;
  const made = decisions.map((d) => [String(d.sequence), number(d.step), number(d.applied ?? d.effective), number(d.checkpoint), folded(d.reason, d.evidence)]);
  table("decisions", ["Number", "After step", "Effective from", "Teacher's step", "Reason and evidence"], made, decisions);
}

// ------------------------------------------------------------------------------------------------------------------ begin

setUpToken(begin);
const openControl = setUpControl((name) => {
  state.stale.add(name);
  state.detailStale = true;
  retry();
});
for (const button of document.querySelectorAll("[data-action]")) {
  button.addEventListener("click", () => {
    const run = chosenRun();
    const detail = state.detail?.name === run.name ? state.detail : null;
    const present = teaching(state.plans.get(run.name)?.segments ?? [], run.step);
    openControl(button.dataset.action, run, detail?.checkpoints ?? [], state.paces.get(run.name)?.pace ?? 0, present?.checkpoint ?? null);
  });
}
for (const which of ["student", "teacher"]) {
  at(`${which}-metric`).addEventListener("change", (event) => {
    state.metric[which] = event.target.value;
    showDetail();
  });
}
at("filter").addEventListener("input", () => (render(), retry()));
at("runs-more").addEventListener("click", () => {
  state.all = true;
  render();
  retry();
});
at("events-mine").addEventListener("change", showEvents);
document.addEventListener("visibilitychange", () => document.hidden || retry());
setInterval(() => state.caller && showReplicas(), 500); // ages grow between two answers
begin();
