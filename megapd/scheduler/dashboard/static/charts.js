// Drawing: the bar of a run in the list (SVG), and the charts (Plotly, from the installed package).

const SVG = "http://www.w3.org/2000/svg";

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
  const made = document.createElementNS(SVG, "rect");
  for (const [key, value] of Object.entries({ x, width, y: kind === "now" ? 0 : 2, height: kind === "now" ? 12 : 8, class: kind })) {
    made.setAttribute(key, value);
  }
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

function now(step) {
  return upright(step, { color: colour("now"), width: 2 });
}

// Teacher's step over student's step. segments: as the service's timeline; checkpoints: [{step, flags}].
export function drawTimeline(element, run, segments, checkpoints) {
  const step = Math.max(run.step, 0);
  const past = { x: [], y: [] };
  const coming = { x: [], y: [] };
  for (const { start, end, checkpoint } of segments) {
    if (start <= step) add(past, start, Math.min(end, step), checkpoint);
    if (end > step) add(coming, Math.max(start, step), end, checkpoint);
  }
  const turns = (kind, wanted, marker) => ({
    name: kind,
    mode: "markers",
    x: wanted.map((segment) => segment.start),
    y: wanted.map((segment) => segment.checkpoint),
    text: wanted.map((s) => plain(`from student step ${s.start}: teacher's step ${s.checkpoint} (version ${s.version}, ${s.policy})`)),
    hoverinfo: "text",
    marker: { size: 9, ...marker },
  });
  const flagged = checkpoints.filter((checkpoint) => checkpoint.flags.length);
  const traces = [
    { name: "taught", mode: "lines", ...past, line: { color: colour("accent"), width: 3 }, hoverinfo: "skip" },
    { name: "planned", mode: "lines", ...coming, line: { color: colour("accent"), width: 2, dash: "dot" }, hoverinfo: "skip" },
    turns("rotations past", segments.filter((s) => s.start <= step), { color: colour("accent") }),
    turns("rotations to come", segments.filter((s) => s.start > step), {
      color: colour("panel"),
      line: { color: colour("accent"), width: 2 },
    }),
    {
      name: "checkpoints",
      mode: "markers",
      x: checkpoints.map(() => 0),
      y: checkpoints.map((checkpoint) => checkpoint.step),
      text: checkpoints.map((checkpoint) => `checkpoint of step ${checkpoint.step}`),
      hoverinfo: "text",
      marker: { symbol: "line-ew-open", size: 9, color: colour("muted") },
    },
  ];
  if (flagged.length) {
    traces.push({
      name: "flagged",
      mode: "markers",
      x: flagged.map(() => 0),
      y: flagged.map((checkpoint) => checkpoint.step),
      text: flagged.map((c) => plain(`step ${c.step}: ${c.flags.map((flag) => `${flag.kind}, ${flag.detail}`).join("; ")}`)),
      hoverinfo: "text",
      marker: { symbol: "x", size: 9, color: colour("bad") },
    });
  }
  const changes = segments.filter((s, place) => place && s.version !== segments[place - 1].version);
  const shapes = [now(step), ...changes.map((s) => upright(s.start, { color: colour("muted"), width: 1, dash: "dash" }))];
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
    hovertemplate: "step %{x}: %{y:.5g}<extra></extra>",
  };
  const step = Math.max(run.step, 0);
  const turns = segments.slice(1).filter((segment) => segment.start <= step);
  const shapes = turns.map((segment) => upright(segment.start, { color: colour("muted"), width: 1, dash: "dot" }));
  draw(element, [trace], layout("student's step", plain(metric), { shapes, showlegend: false }));
}

// One metric of the trajectory's checkpoints; those that the schedule names stand out.
export function drawTeacher(element, run, checkpoints, metric, segments) {
  const wanted = checkpoints.filter((checkpoint) => metric in checkpoint.metrics);
  const step = Math.max(run.step, 0);
  const taught = new Set(segments.filter((s) => s.start <= step).map((s) => s.checkpoint));
  const planned = new Set(segments.filter((s) => s.start > step).map((s) => s.checkpoint));
  const dots = (name, chosen, marker) => ({
    name,
    mode: "markers",
    x: chosen.map((checkpoint) => checkpoint.step),
    y: chosen.map((checkpoint) => checkpoint.metrics[metric]),
    hovertemplate: "step %{x}: %{y:.5g}<extra></extra>",
    marker,
  });
  const line = { ...dots("all", wanted, {}), mode: "lines", line: { color: colour("muted"), width: 1.5 } };
  const traces = [
    line,
    dots("taught", wanted.filter((c) => taught.has(c.step)), { size: 9, color: colour("accent") }),
    dots("to come", wanted.filter((c) => planned.has(c.step) && !taught.has(c.step)), {
      size: 9,
      color: colour("panel"),
      line: { color: colour("accent"), width: 2 },
    }),
    dots("flagged", wanted.filter((c) => c.flags.length), { size: 9, symbol: "x", color: colour("bad") }),
  ];
  draw(element, traces.filter((trace) => trace.x.length), layout("teacher's step", plain(metric), {}));
}
