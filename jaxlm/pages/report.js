"use strict";
// A metric may have any name, also one that every object has.
const plain = (key, value) => (value && typeof value === "object" && !Array.isArray(value) ? Object.assign(Object.create(null), value) : value);
const DATA = JSON.parse(document.getElementById("data").textContent, plain);
const RUNS = DATA.runs;
const SEVERAL = RUNS.length > 1;
const COLOURS = 6;
const AXES = { step: "steps", tokens: "tokens", seconds: "hours" };
const KNOWN = [
  { key: "loss", title: "Loss", unit: "nats a token, training and validation", keys: ["loss", "val_loss"], wide: true },
  { key: "val_bits_per_byte", title: "Bits a byte", unit: "of the validation text", keys: ["val_bits_per_byte"] },
  { key: "lr", title: "Learning rate", unit: "dashed: the plan", keys: ["lr"] },
  { key: "grad_norm", title: "Gradient norm", unit: "before clipping", keys: ["grad_norm"] },
  { key: "tokens_per_second", title: "Tokens a second", unit: "of each step, without pauses", keys: ["tokens_per_second"] },
  { key: "update_ratio", title: "Update-to-weight ratio", unit: "norm of the update over that of the weights",
    keys: ["update_ratio_matrix", "update_ratio_embedding", "update_ratio_norm_scale"] },
];
const DASHES = [undefined, [6, 4], [2, 3]]; // of the keys of a plot, where colours tell the runs apart
const LABELS = plain("", {
  loss: "training", val_loss: "validation", val_bits_per_byte: "validation", lr: "learning rate",
  grad_norm: "gradient norm", tokens_per_second: "tokens/s",
  update_ratio_matrix: "matrices", update_ratio_embedding: "embedding", update_ratio_norm_scale: "norm scales",
});

// What a person has chosen. It survives a reload, as part of the history's entry.
const STATE = Object.assign(
  { axis: "step", logX: false, logY: false, zoom: null, hidden: [], sliders: {}, beside: false, open: [], scroll: 0, focus: "" },
  history.state,
);

// ---- text ----

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}
const byId = (id) => document.getElementById(id);
const plural = (value, name) => `${count(value)} ${name}${value === 1 ? "" : "s"}`;
const count = (value) => (value === null || value === undefined ? "-" : Math.round(value).toLocaleString("en"));

function number(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
  return size >= 1000 ? count(value) : value.toPrecision(4);
}

function short(value) {
  const [divisor, unit] = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]].find(([limit]) => Math.abs(value) >= limit) || [1, ""];
  return `${Number((value / divisor).toPrecision(4))}${unit}`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  if (seconds < 60) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return seconds < 48 * 3600 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

const gigabytes = (bytes) => (bytes >= 1e8 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);

const time = (text) => element("span", { class: "time" }, text);

function table(caption, head, rows) {
  const cells = (row) => row.map((cell, i) => element(i ? "td" : "th", i ? {} : { scope: "row" }, cell));
  return element("div", { class: "scroll table", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...head.map((cell) => element("th", { scope: "col" }, cell)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row))))));
}

// ---- head and summary ----

function stateText(run) {
  const done = `step ${count(run.step)}${run.max_steps > run.step ? ` of ${count(run.max_steps)}` : ""}`;
  if (run.state !== "running" || run.seconds_left === null) return `${run.state}, ${done}`;
  return `${run.state}, ${done}, about ${duration(run.seconds_left)} left`;
}

function showHead() {
  byId("title").textContent = new Intl.ListFormat("en").format(RUNS.map((run) => run.name));
  byId("state").className = SEVERAL ? "" : RUNS[0].state;
  byId("state").append(
    ...(SEVERAL ? [`${RUNS.length} runs`] : [element("span", { class: "dot", "aria-hidden": "true" }), stateText(RUNS[0])]),
    `. Written ${DATA.written}${DATA.refresh_seconds ? ", follows the run" : ""}.`);
  const notes = RUNS.flatMap((run) => [
    ...run.notes.map((note) => `${run.name}: ${note}.`),
    ...Object.entries(run.metrics).filter(([, points]) => points.nonfinite)
      .map(([key, points]) => `${run.name}: ${plural(points.nonfinite, "value")} of ${key} ${points.nonfinite === 1 ? "is" : "are"} not finite.`),
    ...(run.step ? [] : [`${run.name}: no step is done yet.`]),
  ]);
  byId("notes").hidden = !notes.length;
  byId("notes").append(...notes.flatMap((note, i) => (i ? [element("br"), note] : [note])));
  byId("foot").textContent = "Made by python -m jaxlm.report. The file holds everything and asks for nothing.";
}

function showSummary() {
  if (SEVERAL) return showRunTable();
  const [run] = RUNS, last = run.last, session = run.sessions.at(-1) || {};
  const tiles = [
    ["Validation loss", number(last.val_loss), "nats a token"],
    ["Bits a byte", number(last.val_bits_per_byte), "of the validation text"],
    ["Training loss", number(meanOf(run, "loss")), `step ${count(run.step)}`],
    ["Tokens", last.tokens ? short(last.tokens) : "-", `${count(meanOf(run, "tokens_per_second"))} a second`],
    ["Time", duration(last.seconds), run.seconds_left && run.state === "running" ? `${duration(run.seconds_left)} left` : "of training"],
    ["Parameters", session.parameters ? short(session.parameters) : "-", session.device || ""],
  ];
  byId("summary").append(element("dl", {}, ...tiles.map(([name, value, note]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, note))))));
}

// The last value, of the running mean where there is one.
function meanOf(run, key) {
  const points = run.metrics[key];
  return points ? (points.mean || points).value.at(-1) : null;
}

function showRunTable() {
  const rows = RUNS.map((run, i) => {
    const box = element("input", { type: "checkbox", class: "swatch", id: `run-${i}`, onchange: (event) => {
      STATE.hidden = STATE.hidden.filter((each) => each !== i).concat(event.target.checked ? [] : [i]);
      drawAll();
    } });
    box.checked = !STATE.hidden.includes(i);
    box.style.accentColor = `var(--run-${i % COLOURS})`;
    return [element("label", {}, box, run.name), stateText(run), number(meanOf(run, "loss")), number(run.last.val_loss),
      number(run.last.val_bits_per_byte), count(meanOf(run, "tokens_per_second")), duration(run.last.seconds)];
  });
  byId("summary").append(table("The runs; a tick shows a run in the plots",
    ["Run", "State", "Training loss", "Validation loss", "Bits a byte", "Tokens/s", "Time"], rows));
}

// ---- plots ----

const SCREEN = plain("", {}); // what is drawn, by key: {spec, lines, node, plot}
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const position = (points) => (STATE.axis === "seconds" ? points.seconds.map((s) => s === null ? null : s / 3600) : points[STATE.axis]);
const positive = (value) => (value > 0 ? value : null);

function specs() {
  const known = new Set(KNOWN.flatMap((spec) => spec.keys));
  const others = [...new Set(RUNS.flatMap((run) => Object.keys(run.metrics)))].filter((key) => !known.has(key));
  const all = [...KNOWN, ...others.map((key) => ({ key, title: key, unit: "from metrics.jsonl", keys: [key] }))];
  return all.filter((spec) => RUNS.some((run) => spec.keys.some((key) => run.metrics[key]?.value.length)));
}

// The lines of a plot: {label, x, y, stroke, width, dash, points}.
function linesOf(spec) {
  return RUNS.flatMap((run, i) => (STATE.hidden.includes(i) ? [] : spec.keys.flatMap((key) => linesOfKey(spec, run, i, key))));
}

function linesOfKey(spec, run, i, key) {
  const points = run.metrics[key];
  if (!points) return [];
  const nth = spec.keys.indexOf(key), dash = SEVERAL ? DASHES[nth] : undefined;
  const stroke = colour(`run-${SEVERAL ? i % COLOURS : key.startsWith("val_") ? 1 : nth}`);
  const name = SEVERAL ? (spec.keys.length > 1 ? `${run.name}, ${LABELS[key]}` : run.name) : LABELS[key] || key;
  const line = (label, of, width, more = {}) => ({ label, x: position(of), y: of.value, stroke, width, ...more });
  const few = points.value.length <= 80;
  const lines = [];
  if (points.mean) {
    const faint = `${stroke}${points.value.length > 800 ? "38" : "66"}`;
    if (!SEVERAL) lines.push(line(`${name}, each step`, points, 1, { stroke: faint, quiet: true }));
    lines.push(line(name, points.mean, 2, { dash }));
  } else lines.push(line(name, points, 2, { dash, points: few && key !== "lr" || points.value.length === 1 }));
  const planned = plannedLine(run, key);
  if (planned) lines.push(line(`${SEVERAL ? `${run.name}, ` : ""}plan`, planned, 1.5, { stroke: SEVERAL ? stroke : colour("quiet"), dash: [3, 4], quiet: true }));
  return lines;
}

function plannedLine(run, key) {
  if (key === "lr") return run.plan?.lr;
  const seconds = run.plan?.step_seconds, speed = run.metrics[key];
  if (key !== "tokens_per_second" || !seconds || SEVERAL) return null;
  const ends = (values) => [values[0], values.at(-1)];
  const rate = run.tokens_per_step / seconds;
  return { step: ends(speed.step), tokens: ends(speed.tokens), seconds: ends(speed.seconds), value: [rate, rate] };
}

// The lines on one axis, as uPlot takes them: undefined where a line has no point, null where a value is not finite.
function aligned(lines) {
  const usable = (line) => line.x.map((x, i) => [STATE.logX ? positive(x) : x, STATE.logY ? positive(line.y[i]) : line.y[i]])
    .filter(([x]) => x !== null && x !== undefined);
  const tables = lines.map(usable).map((pairs) => [pairs.map(([x]) => x), pairs.map(([, y]) => y ?? null)]);
  return tables.length ? uPlot.join(tables) : [[], []];
}

function fullRange() {
  let [low, high] = [Infinity, -Infinity];
  RUNS.forEach((run, i) => Object.values(STATE.hidden.includes(i) ? {} : run.metrics).forEach((points) => {
    for (const x of position(points)) {
      if (x === null || (STATE.logX && x <= 0)) continue;
      if (x < low) low = x;
      if (x > high) high = x;
    }
  }));
  if (low > high) return STATE.logX ? [1, 10] : [0, 1];
  if (!STATE.logX) return [0, high || 1];
  return low < high ? [low, high] : [low / 2, low * 2];
}

const atText = (x) => (STATE.axis === "seconds" ? number(x) : count(x));

// Moves or scales what the plots show: `from` and `to` are parts of the range shown now.
function zoomTo(from, to) {
  const [low, high] = (STATE.zoom || fullRange()).map((x) => (STATE.logX ? Math.log(x) : x));
  const [full, end] = fullRange().map((x) => (STATE.logX ? Math.log(x) : x));
  let range = [low + from * (high - low), low + to * (high - low)];
  if (range[1] - range[0] >= end - full) range = null;
  else {
    const shift = Math.max(full - range[0], 0) + Math.min(end - range[1], 0);
    range = range.map((x) => x + shift).map((x) => (STATE.logX ? Math.exp(x) : x));
  }
  setZoom(range);
}

function setZoom(range) {
  STATE.zoom = range;
  const [min, max] = range || fullRange();
  for (const { plot } of Object.values(SCREEN)) plot?.setScale("x", { min, max });
}

function options(spec, lines, width) {
  const axis = (label) => ({ stroke: colour("quiet"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif", ...label });
  const [min, max] = STATE.zoom || fullRange();
  return {
    width, height: spec.wide ? Math.max(260, Math.min(380, width * 0.5)) : 220,
    cursor: {
      drag: { x: true, y: false, setScale: false },
      sync: { key: "plots", setSeries: false },
      points: { size: 7 },
      dataIdx: nearestPoint,
      bind: { dblclick: () => () => setZoom(null) },
    },
    scales: {
      x: { time: false, distr: STATE.logX ? 3 : 1, min, max, range: (plot, low, high) => [low, high] },
      y: STATE.logY ? { distr: 3, range: (plot, low, high) => logRange(low, high) } : { range: linearRange },
    },
    axes: [
      axis({ values: (plot, ticks) => ticks.map((x) => (x === null ? "" : short(x))), splits: STATE.logX ? logTicks : undefined, label: AXES[STATE.axis], size: 28, labelSize: 16, labelGap: 0, labelFont: "12px system-ui, sans-serif" }),
      axis({ values: (plot, ticks) => ticks.map((y) => (y === null ? "" : tick(y))), splits: STATE.logY ? logTicks : undefined, size: 58 }),
    ],
    series: [
      { label: AXES[STATE.axis], value: (plot, x, i, at) => atText(at === null ? (STATE.zoom || fullRange())[1] : x) },
      ...lines.map((line) => ({
        label: line.label, stroke: line.stroke, width: line.width, dash: line.dash,
        points: { show: line.points || false, size: 5, fill: line.stroke }, value: (plot, y, i, at) => number(at === null ? lastShown(line) : y),
      })),
    ],
    hooks: {
      setSelect: [(plot) => {
        const { left, width: wide } = plot.select;
        if (wide > 4) setZoom([plot.posToVal(left, "x"), plot.posToVal(left + wide, "x")]);
        plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      }],
      draw: spec.key === "tokens_per_second" ? [drawMarks] : [],
    },
  };
}

const tick = (y) => (Math.abs(y) >= 1000 ? short(y) : y !== 0 && Math.abs(y) < 1e-3 ? y.toExponential(0) : String(Number(y.toPrecision(6))));

// The last value of a line in what is shown.
function lastShown({ x, y }) {
  const [, end] = STATE.zoom || fullRange();
  return y[x.findLastIndex((each, i) => each !== null && each <= end && y[i] !== null)];
}

// Without the first hundredth of each run, if that takes more than half of the height of a plot that is not log across.
function linearRange(plot, low, high) {
  if (low === null || high === null) return [0, 1];
  const full = fullRange(), [min, max] = STATE.zoom || full, [xs, ...lines] = plot.data;
  let [least, most] = [Infinity, -Infinity];
  for (const ys of lines) {
    const begin = Math.min(xs[ys.findLastIndex((y) => y !== undefined)], full[1]) / 100;
    ys.forEach((y, i) => {
      if (y === null || y === undefined || xs[i] < begin || xs[i] < min || xs[i] > max) return;
      least = Math.min(least, y);
      most = Math.max(most, y);
    });
  }
  return !STATE.logX && most > least && high - low > 2 * (most - least) ? uPlot.rangeNum(least, most, 0.1, true) : uPlot.rangeNum(low, high, 0.1, true);
}

function logRange(low, high) {
  if (low === null || high === null) return [1, 10];
  return low < high ? [low / 1.05, high * 1.05] : [low / 2, high * 2];
}

// uPlot's own never end if `low` is no power of ten.
function logTicks(plot, axis, low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (let digit = 1; digit < 10; digit++) ticks.push(Number(`${digit}e${power}`));
  }
  const inside = ticks.filter((each) => each >= low && each <= high);
  return inside.length ? inside : [low, high];
}

// The cursor reads the nearest point of each line.
function nearestPoint(plot, line, hovered) {
  const values = plot.data[line];
  if (line === 0 || values[hovered] !== undefined) return hovered;
  let [left, right] = [hovered, hovered];
  while (left > 0 && values[left] === undefined) left--;
  while (right < values.length - 1 && values[right] === undefined) right++;
  const x = plot.data[0], at = x[hovered];
  if (values[left] === undefined) return right;
  return values[right] === undefined || at - x[left] <= x[right] - at ? left : right;
}

// Restarts are dashed lines from top to bottom, pauses are bars at the bottom, the longest the highest.
function drawMarks(plot) {
  const { ctx, bbox } = plot, ratio = devicePixelRatio;
  const inside = (x) => x !== null && x >= plot.scales.x.min && x <= plot.scales.x.max;
  ctx.save();
  RUNS.forEach((run, i) => {
    if (STATE.hidden.includes(i)) return;
    const longest = Math.max(...run.pauses.length, 0);
    ctx.fillStyle = SEVERAL ? colour(`run-${i % COLOURS}`) : colour("run-1");
    ctx.strokeStyle = ctx.fillStyle;
    position(run.pauses).forEach((x, n) => {
      const height = (3 + 21 * Math.sqrt(run.pauses.length[n] / longest)) * ratio;
      if (inside(x)) ctx.fillRect(plot.valToPos(x, "x", true), bbox.top + bbox.height - height, ratio, height);
    });
    ctx.setLineDash([2 * ratio, 3 * ratio]);
    ctx.lineWidth = ratio;
    position(run.restarts).filter(inside).forEach((x) => {
      const left = plot.valToPos(x, "x", true);
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
    });
  });
  ctx.restore();
}

function marksText(run) {
  const { pauses, restarts } = run, seconds = run.last.seconds || 0;
  const longest = pauses.length.indexOf(Math.max(...pauses.length));
  const share = seconds ? ` (${(100 * pauses.total / seconds).toFixed(1)}% of the time)` : "";
  const name = SEVERAL ? `${run.name}: ` : "";
  const paused = pauses.count
    ? `${plural(pauses.count, "pause")}, ${duration(pauses.total)} in all${share}, the longest ${duration(pauses.length[longest])} before step ${count(pauses.step[longest])} (bars at the bottom)`
    : "no pauses";
  return `${name}${paused}; ${restarts.count ? `${plural(restarts.count, "restart")} (dashed)` : "no restarts"}.`;
}

function describe(lines) {
  return lines.filter((line) => !line.quiet).map((line) => {
    const values = line.y.filter((y) => y !== null);
    if (!values.length) return `${line.label}: no finite value.`;
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    return `${line.label}: from ${number(values[0])} to ${number(values.at(-1))}, lowest ${number(low)}, highest ${number(high)}.`;
  }).join(" ");
}

// About a dozen rows of a plot's numbers, evenly over what is shown.
function valueTable(spec, lines) {
  const [low, high] = STATE.zoom || fullRange();
  const shown = lines.filter((line) => !line.quiet);
  const xs = [...new Set(shown.flatMap((line) => line.x))].filter((x) => x !== null && x >= low && x <= high).sort((a, b) => a - b);
  const chosen = [...new Set(Array.from({ length: Math.min(12, xs.length) }, (_, i) => xs[Math.round(i * (xs.length - 1) / Math.max(Math.min(12, xs.length) - 1, 1))]))];
  const valueAt = (line, x) => {
    let best = -1;
    line.x.forEach((each, i) => { if (each !== null && each <= x) best = i; });
    return best < 0 ? "-" : number(line.y[best]);
  };
  return table(`${spec.title} against ${AXES[STATE.axis]}`, [AXES[STATE.axis], ...shown.map((line) => line.label)],
    chosen.map((x) => [atText(x), ...shown.map((line) => valueAt(line, x))]));
}

function makeFigure(spec) {
  const node = element("div", { class: "plot", role: "img", tabindex: "0", id: `plot-${spec.key}`, onkeydown: (event) => onKey(event, spec.key) });
  const values = element("details", { id: `values-${spec.key}`, ontoggle: () => fillTable(spec.key) }, element("summary", {}, "Values"));
  const marks = spec.key === "tokens_per_second" ? RUNS.map((run) => element("p", { class: "hint" }, marksText(run))) : [];
  byId("plots").append(element("figure", { class: spec.wide ? "wide" : "" },
    element("figcaption", {}, element("h3", {}, spec.title), element("p", {}, spec.unit)), node, ...marks, values));
  SCREEN[spec.key] = { spec, node, values, plot: null, lines: [] };
}

function fillTable(key) {
  const { spec, values, lines } = SCREEN[key];
  values.querySelector(".table")?.remove();
  if (values.open) values.append(valueTable(spec, lines));
}

function draw(key) {
  const shown = SCREEN[key];
  shown.plot?.destroy();
  shown.lines = linesOf(shown.spec);
  const width = shown.node.clientWidth;
  shown.plot = new uPlot(options(shown.spec, shown.lines, width), aligned(shown.lines), shown.node);
  shown.node.querySelector(".u-legend").setAttribute("aria-hidden", "true"); // the label and the table say it
  shown.node.setAttribute("aria-label", `${shown.spec.title} against ${AXES[STATE.axis]}. ${describe(shown.lines)}`);
  fillTable(key);
}

const drawAll = () => Object.keys(SCREEN).forEach(draw);

function onKey(event, key) {
  const moves = {
    "+": () => zoomTo(0.25, 0.75), "=": () => zoomTo(0.25, 0.75), "-": () => zoomTo(-0.5, 1.5), 0: () => setZoom(null), Escape: () => setZoom(null),
    ArrowLeft: () => (event.shiftKey ? zoomTo(-0.25, 0.75) : read(key, -1)), ArrowRight: () => (event.shiftKey ? zoomTo(0.25, 1.25) : read(key, 1)),
  };
  if (event.ctrlKey || event.metaKey || event.altKey || !moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
}

// Moves the cursor by a fiftieth of the width, and says what it reads.
function read(key, direction) {
  const { plot, lines } = SCREEN[key], width = plot.over.clientWidth;
  const left = Math.min(Math.max((plot.cursor.left < 0 ? (direction > 0 ? 0 : width) : plot.cursor.left) + direction * width / 50, 0), width - 1);
  plot.setCursor({ left, top: plot.over.clientHeight / 2 });
  const at = plot.posToIdx(left);
  const values = lines.map((line, i) => (line.quiet ? null : `${line.label} ${number(plot.data[i + 1][nearestPoint(plot, i + 1, at)])}`));
  byId("reading").textContent = `${AXES[STATE.axis]} ${atText(plot.data[0][at])}: ${values.filter((text) => text).join(", ")}`;
}

function showPlots() {
  specs().forEach(makeFigure);
  byId(`axis-${STATE.axis}`).checked = true;
  byId("log-x").checked = STATE.logX;
  byId("log-y").checked = STATE.logY;
  for (const axis of Object.keys(AXES)) byId(`axis-${axis}`).addEventListener("change", () => { Object.assign(STATE, { axis, zoom: null }); drawAll(); });
  byId("log-x").addEventListener("change", (event) => { Object.assign(STATE, { logX: event.target.checked, zoom: null }); drawAll(); });
  byId("log-y").addEventListener("change", (event) => { STATE.logY = event.target.checked; drawAll(); });
  byId("zoom-in").addEventListener("click", () => zoomTo(0.25, 0.75));
  byId("zoom-out").addEventListener("click", () => zoomTo(-0.5, 1.5));
  byId("zoom-reset").addEventListener("click", () => setZoom(null));
  drawAll();
  new ResizeObserver(() => Object.values(SCREEN).forEach(({ spec, node, plot }) => {
    if (plot && node.clientWidth !== plot.width) plot.setSize(options(spec, [], node.clientWidth));
  })).observe(byId("plots"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  const paper = (on) => () => { document.documentElement.classList.toggle("print", on); drawAll(); };
  addEventListener("beforeprint", paper(true));
  addEventListener("afterprint", paper(false));
}

// ---- samples ----

function showSamples() {
  const section = byId("samples"), cards = [];
  if (!RUNS.some((run) => run.samples.length)) return section.append(element("p", { class: "quiet" }, "There is no sample yet."));
  const steps = [...new Set(RUNS.flatMap((run) => run.samples.flatMap((each) => each.entries.map((entry) => entry.step))))].sort((a, b) => a - b);
  const label = element("output", { id: "all-output", for: "all" });
  const all = element("input", { type: "range", id: "all", min: 0, max: steps.length - 1, value: steps.length - 1, oninput: () => {
    const step = steps[all.value];
    label.textContent = `step ${count(step)}`;
    all.setAttribute("aria-valuetext", label.textContent);
    cards.forEach((card) => card.show(Math.max(card.entries.findLastIndex((entry) => entry.step <= step), 0)));
  } });
  const beside = element("input", { type: "checkbox", role: "switch", id: "beside", onchange: () => {
    STATE.beside = beside.checked;
    cards.forEach((card) => card.show(card.index));
  } });
  beside.checked = STATE.beside;
  label.textContent = `step ${count(steps.at(-1))}`;
  section.append(element("div", { class: "master" }, element("label", { for: "all" }, "All prompts at"), label, all,
    element("label", {}, beside, " show the one before")));
  section.append(element("p", { class: "hint" }, "Each slider goes through the steps of its prompt. Words that the sample before lacks are marked."));
  RUNS.forEach((run, i) => {
    if (SEVERAL) section.append(element("h3", { class: "subtitle" }, run.name));
    const node = element("div", { class: "cards" });
    run.samples.forEach((sample, n) => cards.push(makeCard(node, run, sample, `sample-${i}-${n}`)));
    section.append(node);
  });
}

function makeCard(parent, run, { prompt, count: total, entries }, id) {
  const output = element("output", { for: id }), text = element("p", { class: "sample", dir: "auto" });
  const before = element("p", { class: "sample before", dir: "auto", hidden: true });
  const slider = element("input", { type: "range", id, min: 0, max: entries.length - 1, disabled: entries.length < 2,
    "aria-label": `Step of the sample of ${prompt}`, oninput: () => card.show(Number(slider.value)) });
  const card = { entries, index: 0, show: (index) => {
    const entry = entries[index], previous = entries[index - 1];
    card.index = index;
    slider.value = index;
    STATE.sliders[id] = index === entries.length - 1 ? "last" : index;
    output.textContent = `step ${count(entry.step)}${hoursAt(run, entry.step)}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    fillSample(text, prompt, entry.text, previous?.text);
    before.hidden = !(STATE.beside && previous);
    if (previous) before.textContent = `step ${count(previous.step)}: ${previous.text}`;
  } };
  const more = total > entries.length ? `, ${entries.length} of ${count(total)} samples` : "";
  parent.append(element("article", { class: "card", "aria-label": `Samples of ${prompt}${more}` },
    element("header", {}, element("h3", { dir: "auto" }, prompt || "(no prompt)"), output), slider, text, before));
  const saved = STATE.sliders[id];
  card.show(saved === undefined || saved === "last" ? entries.length - 1 : Math.min(saved, entries.length - 1));
  return card;
}

// After how much training a step was done, from the points of the loss.
function hoursAt(run, step) {
  const points = run.metrics.loss;
  const at = points ? points.step.findIndex((each) => each >= step) : -1;
  return at < 0 || points.seconds[at] === null ? "" : `, after ${duration(points.seconds[at])}`;
}

function fillSample(node, prompt, text, before) {
  const start = text.startsWith(prompt) ? prompt.length : 0;
  const parts = before === undefined ? [[text.slice(start), false]] : changedParts(before.slice(before.startsWith(prompt) ? prompt.length : 0), text.slice(start));
  node.replaceChildren(element("span", { class: "prompt" }, text.slice(0, start)),
    ...parts.map(([part, changed]) => (changed ? element("mark", {}, part) : part)));
}

// ---- tables ----

function showPlan() {
  for (const run of RUNS) {
    const { plan, last } = run;
    if (SEVERAL) byId("plan").append(element("h3", { class: "subtitle" }, run.name));
    if (!plan) {
      byId("plan").append(element("p", { class: "quiet" }, "config.json is missing or damaged, so the plan is not known."));
      continue;
    }
    const share = run.step / run.max_steps, speed = meanOf(run, "tokens_per_second");
    const rows = [
      ["Steps", count(run.max_steps), count(run.step)],
      ["Tokens", short(plan.tokens), last.tokens ? short(last.tokens) : "-"],
      ["Learning rate, last", number(plan.lr.value.at(-1)), number(last.lr)],
      ["Tokens a second", plan.step_seconds ? count(run.tokens_per_step / plan.step_seconds) : "not measured", count(speed)],
      ["Time", duration(plan.total_seconds), duration(last.seconds)],
    ];
    if (share < 1 && run.step) rows.push([`Time to step ${count(run.step)}`, plan.total_seconds ? `about ${duration(plan.total_seconds * share)}` : "-", duration(last.seconds)]);
    const data = run.sessions.at(-1)?.data_tokens;
    if (data && last.tokens) rows.push(["Epochs of the data", number(plan.tokens / data), number(last.tokens / data)]);
    byId("plan").append(table(`${run.name}: what was planned and what is done`, ["", "Plan", "Run"], rows));
  }
}

function showCheckpoints() {
  for (const run of RUNS) {
    if (SEVERAL) byId("checkpoints").append(element("h3", { class: "subtitle" }, run.name));
    if (!run.checkpoints.length) {
      byId("checkpoints").append(element("p", { class: "quiet" }, "There is no checkpoint yet."));
      continue;
    }
    byId("checkpoints").append(
      table(`${run.name}: checkpoints on the disk`, ["Checkpoint", "Saved", "Size", "Validation loss"],
        run.checkpoints.map((each) => [each.name, time(each.time), gigabytes(each.bytes), number(each.val_loss)])),
      element("p", {}, "To sample from the model (--step chooses another checkpoint):"),
      element("pre", { tabindex: "0" }, run.sample_command));
  }
}

function showSessions() {
  const rows = RUNS.flatMap((run) => run.sessions.map((each) => [...(SEVERAL ? [run.name] : []), time(each.time.replace("T", " ").replace("+00:00", " UTC")),
    count(each.step), each.device, each.precision, element("span", { class: "long" }, each.versions)]));
  const head = [...(SEVERAL ? ["Run"] : []), "Began", "After step", "Device", "Precision", "Versions"];
  byId("sessions").append(...(rows.length ? [table("The last sessions of training", head, rows)]
    : [element("p", { class: "quiet" }, "sessions.jsonl is missing: device and versions are not known.")]));
  for (const run of RUNS) if (run.data) byId("sessions").append(element("p", { class: "quiet" }, `${SEVERAL ? `${run.name}: ` : ""}data: ${run.data}`));
}

function showSettings() {
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.settings)))];
  const values = (name) => RUNS.map((run) => run.settings[name] ?? "-");
  const head = ["Setting", ...RUNS.map((run) => (SEVERAL ? run.name : "Value"))];
  const rows = (some) => some.map((name) => [name, ...values(name)]);
  if (SEVERAL) {
    const different = names.filter((name) => new Set(values(name)).size > 1);
    byId("settings").append(different.length ? table("Settings that differ", head, rows(different))
      : element("p", {}, "The runs have the same settings."));
  }
  byId("settings").append(element("details", { id: "all-settings" }, element("summary", {}, `All ${names.length} settings`), table("All settings", head, rows(names))));
}

// ---- following a run ----

function remember() {
  STATE.open = [...document.querySelectorAll("details[open]")].map((each) => each.id);
  Object.assign(STATE, { scroll: scrollY, focus: document.activeElement?.id || "" });
  history.replaceState(STATE, "");
}

function follow() {
  remember();
  location.reload();
}

function restore() {
  for (const id of STATE.open) byId(id)?.setAttribute("open", "");
  if (STATE.focus) byId(STATE.focus)?.focus({ preventScroll: true });
  scrollTo(0, STATE.scroll);
}

history.scrollRestoration = "manual";
showHead();
showSummary();
showPlots();
showSamples();
showPlan();
showCheckpoints();
showSessions();
showSettings();
setTimeout(restore); // after the plots have their sizes
addEventListener("pagehide", remember);
if (DATA.refresh_seconds) setTimeout(follow, 1000 * DATA.refresh_seconds);
