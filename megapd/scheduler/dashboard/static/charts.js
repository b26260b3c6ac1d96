// Drawing: the bar of a run in the list (SVG), and the charts (Plotly, from the installed package).

// Plotly reads a few tags in texts (<b>, <a>, <br>), so what comes from the service is escaped for it.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// The run's schedule from its first step to its last: rotations as parts of two shades, what is done filled.
export function drawBar(svg, run, segments) {
  const width = 1000;
  const done = (Math.max(run.step, 0) / run.steps) * width;
  const parts = [rectangle(0, width, "rest"), rectangle(0, done, "done")];
  for (const segment of segments.slice(1)) parts.push(rectangle((segment.start / run.steps) * width - 1.5, 3, "turn"));
  parts.push(rectangle(Math.min(done, width - 6), 6, "now"));
  svg.replaceChildren(...parts);
}

function rectangle(x, width, kind) {
  return drawn("rect", { x, width, y: kind === "now" ? 0 : 2, height: kind === "now" ? 12 : 8, class: kind });
}

// An element of SVG.
export function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function layout(xTitle, yTitle, more) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, rangemode: "tozero" };
  return {
    margin: { l: 52, r: 12, t: 8, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("text"), family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { align: "left" },
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    dragmode: false,
    xaxis: { ...axis, title: { text: xTitle } },
    yaxis: { ...axis, title: { text: yTitle } },
    ...more,
  };
}

function draw(element, traces, shape) {
  if (!window.Plotly) {
    element.classList.add("chart-none");
    element.textContent = "No charts: the service has no package plotly (pip install plotly).";
    return;
  }
  window.Plotly.react(element, traces, shape, { responsive: true, displayModeBar: false, displaylogo: false });
}

function upright(x, line) {
  return { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, layer: "below", line };
}

// Points of their own. hover: what Plotly shows beside one.
function dots(name, x, y, marker, hover) {
  return { name, mode: "markers", x, y, marker: { size: 9, ...marker }, ...hover };
}

const said = (texts) => ({ text: texts.map(plain), hoverinfo: "text" });
const VALUE = { hovertemplate: "step %{x}: %{y:.5g}<extra></extra>" };
const full = () => ({ color: colour("accent") });
const hollow = () => ({ color: colour("panel"), line: { color: colour("accent"), width: 2 } });
const crossed = () => ({ symbol: "x", color: colour("bad") });

// Teacher's step over student's step. segments: as the service's timeline; checkpoints: [{step, flags}].
export function drawTimeline(element, run, segments, checkpoints) {
  const step = Math.max(run.step, 0);
  const past = { x: [], y: [] };
  const coming = { x: [], y: [] };
  for (const { start, end, checkpoint } of segments) {
    if (start <= step) add(past, start, Math.min(end, step), checkpoint);
    if (end > step) add(coming, Math.max(start, step), end, checkpoint);
  }
  const turn = (s) => `from student step ${s.start}: teacher's step ${s.checkpoint} (version ${s.version}, ${s.policy})`;
  const turns = (name, wanted, marker) =>
    dots(name, wanted.map((s) => s.start), wanted.map((s) => s.checkpoint), marker, said(wanted.map(turn)));
  const stored = (name, wanted, marker, tell) =>
    dots(name, wanted.map(() => 0), wanted.map((checkpoint) => checkpoint.step), marker, said(wanted.map(tell)));
  const flagged = checkpoints.filter((checkpoint) => checkpoint.flags.length);
  const flags = (c) => `step ${c.step}: ${c.flags.map((flag) => `${flag.kind}, ${flag.detail}`).join("; ")}`;
  const traces = [
    { name: "taught", mode: "lines", ...past, line: { color: colour("accent"), width: 3 }, hoverinfo: "skip" },
    { name: "planned", mode: "lines", ...coming, line: { color: colour("accent"), width: 2, dash: "dot" }, hoverinfo: "skip" },
    turns("rotations past", segments.filter((s) => s.start <= step), full()),
    turns("rotations to come", segments.filter((s) => s.start > step), hollow()),
    stored("checkpoints", checkpoints, { symbol: "line-ew-open", color: colour("muted") }, (c) => `checkpoint of step ${c.step}`),
  ];
  if (flagged.length) traces.push(stored("flagged", flagged, crossed(), flags));
  const changes = segments.filter((s, place) => place && s.version !== segments[place - 1].version);
  const now = upright(step, { color: colour("now"), width: 2 });
  const shapes = [now, ...changes.map((s) => upright(s.start, { color: colour("muted"), width: 1, dash: "dash" }))];
  const more = layout("student's step", "teacher's step", { shapes });
  more.xaxis.range = [-run.steps * 0.015, run.steps * 1.015];
  draw(element, traces, more);
}

function add(line, from, to, y) {
  line.x.push(from, to);
  line.y.push(y, y);
}

// One metric of a run's reports; uprights where another checkpoint began to teach.
export function drawStudent(element, run, points, metric, segments) {
  const wanted = points.filter((point) => metric in point.metrics);
  const trace = {
    name: plain(metric),
    mode: wanted.length > 60 ? "lines" : "lines+markers",
    x: wanted.map((point) => point.step),
    y: wanted.map((point) => point.metrics[metric]),
    line: { color: colour("accent"), width: 2 },
    ...VALUE,
  };
  const turns = segments.slice(1).filter((segment) => segment.start <= Math.max(run.step, 0));
  const shapes = turns.map((segment) => upright(segment.start, { color: colour("muted"), width: 1, dash: "dot" }));
  draw(element, [trace], layout("student's step", plain(metric), { shapes, showlegend: false }));
}

// One metric of the trajectory's checkpoints; those that the schedule names stand out.
export function drawTeacher(element, run, checkpoints, metric, segments) {
  const wanted = checkpoints.filter((checkpoint) => metric in checkpoint.metrics);
  const step = Math.max(run.step, 0);
  const taught = new Set(segments.filter((s) => s.start <= step).map((s) => s.checkpoint));
  const planned = new Set(segments.filter((s) => s.start > step).map((s) => s.checkpoint));
  const some = (name, chosen, marker) => dots(name, chosen.map((c) => c.step), chosen.map((c) => c.metrics[metric]), marker, VALUE);
  const traces = [
    { ...some("all", wanted, {}), mode: "lines", line: { color: colour("muted"), width: 1.5 } },
    some("taught", wanted.filter((c) => taught.has(c.step)), full()),
    some("to come", wanted.filter((c) => planned.has(c.step) && !taught.has(c.step)), hollow()),
    some("flagged", wanted.filter((c) => c.flags.length), crossed()),
  ];
  draw(element, traces.filter((trace) => trace.x.length), layout("teacher's step", plain(metric), {}));
}
