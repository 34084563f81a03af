// The live page: polls /live once a second and draws the answer. No framework, no build step.

const POLL_MS = 1000;
const KEEP = 600; // samples of the charts: ten minutes
const TIMEOUT_MS = 8000;

const by = (id) => document.getElementById(id);
const number = (value, digits = 0) =>
  value == null || Number.isNaN(value) ? "–" : Number(value).toLocaleString("en", { maximumFractionDigits: digits });
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");
const text = (tag, content, className) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (content != null) element.textContent = content;
  return element;
};

// --- requests to the server --------------------------------------------------------------------

const storage = {
  get: (name) => sessionStorage.getItem(name) || "",
  set: (name, value) => sessionStorage.setItem(name, value),
};

async function ask(path, options = {}) {
  const key = options.key ?? storage.get("key");
  const headers = { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...(options.body ? { "Content-Type": "application/json" } : {}) };
  const response = await fetch(path, {
    method: options.method || "GET",
    headers,
    body: options.body && JSON.stringify(options.body),
    signal: AbortSignal.timeout(options.timeoutMs ?? TIMEOUT_MS),
  });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = new Error(body.error?.message || `${response.status} ${response.statusText}`);
    error.status = response.status;
    throw error;
  }
  return body;
}

let keyIsWanted = true; // until the user cancels the dialog

function askForKey() {
  const dialog = by("key-dialog");
  if (dialog.open) return;
  by("key-why").textContent = storage.get("key") ? "The server does not know this key." : "This server requires a key. The page keeps it in this tab only.";
  dialog.returnValue = "";
  dialog.showModal();
  dialog.addEventListener("close", () => {
    keyIsWanted = dialog.returnValue === "ok";
    if (keyIsWanted) storage.set("key", by("key").value);
    by("key").value = "";
  }, { once: true });
}

function say(problem, needsKey = false) {
  by("problem").hidden = problem == null;
  by("problem-text").textContent = problem ?? "";
  by("key-open").hidden = !needsKey;
}

// --- charts ------------------------------------------------------------------------------------

const style = getComputedStyle(document.documentElement);
const color = (name) => style.getPropertyValue(`--${name}`).trim();
const PALETTE = ["prefill", "decode", "transfer", "bad", "queued", "good"];

class Chart {
  constructor(id, series, options = {}) {
    this.box = by(id);
    this.options = options;
    this.build(series);
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(this.box);
  }

  build(series) {
    this.plot?.destroy();
    this.names = series.map((line) => line.label);
    this.data = [[], ...series.map(() => [])];
    const axis = { stroke: color("muted"), grid: { stroke: color("line"), width: 1 }, ticks: { stroke: color("line"), width: 1 } };
    this.plot = new uPlot({
      ...this.size(),
      cursor: { y: false, points: { size: 6 } },
      scales: { x: { time: true, range: (_, low, high) => [Math.min(low, high - 60), high] }, y: { range: (_, low, high) => [0, this.options.max ?? Math.max(high * 1.15, 1)] } },
      axes: [{ ...axis, space: 90, values: (_, ticks) => ticks.map(clock) }, { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => number(tick, 1)) }],
      series: [
        { label: "at", value: (_, seconds) => (seconds == null ? "–" : clock(seconds)) },
        ...series.map((line) => ({
          label: line.label,
          stroke: color(line.color),
          width: line.dash ? 1.2 : 2,
          dash: line.dash,
          fill: line.fill && `color-mix(in srgb, ${color(line.color)} 14%, transparent)`,
          points: { show: false },
          value: (_, value) => number(value, 1),
        })),
      ],
    }, this.data, this.box);
  }

  size() {
    return { width: Math.max(200, this.box.clientWidth), height: this.options.height ?? 190 };
  }

  add(seconds, values) {
    this.data[0].push(seconds);
    values.forEach((value, index) => this.data[index + 1].push(value));
    if (this.data[0].length > KEEP) this.data.forEach((column) => column.shift());
    this.plot.setData(this.data);
    if (this.plot.cursor.idx == null) this.plot.setLegend({ idx: this.data[0].length - 1 }); // the newest, unless the pointer is on the chart
  }
}

const charts = {};

function makeCharts() {
  charts.throughput = new Chart("chart-throughput", [
    { label: "prefill", color: "prefill", fill: true },
    { label: "decode", color: "decode", fill: true },
  ]);
  charts.queues = new Chart("chart-queues", [
    { label: "waiting", color: "queued", fill: true },
    { label: "prefilling", color: "prefill" },
    { label: "transferring", color: "transfer" },
    { label: "decoding", color: "decode" },
  ]);
  for (const name of ["ttft", "tpot"]) {
    charts[name] = new Chart(`chart-${name}`, [
      { label: "p50", color: "decode" },
      { label: "p95", color: "prefill" },
      { label: "target", color: "bad", dash: [6, 5] },
    ]);
  }
  charts.split = new Chart("chart-split", [], { height: 170, max: 100 });
}

// --- the picture -------------------------------------------------------------------------------

let lastSplitNames = "";

function targetsOf(data) {
  return { ttft: data.targets.ttft_ms, tpot: data.targets.tpot_ms };
}

function show(data) {
  const stats = data.stats;
  say(data.error);
  showStatus(data);
  if (!stats) return;
  const metrics = stats.metrics ?? {};
  const view = metrics.window ?? {};
  const queues = metrics.queues?.requests ?? {};
  const targets = targetsOf(data);
  showTiles(data, view, queues, metrics, targets);
  charts.throughput.add(data.time, [view.prefill_throughput, view.decode_throughput]);
  charts.queues.add(data.time, [queues.waiting, queues.prefilling, queues.transferring, queues.decoding]);
  charts.ttft.add(data.time, [view.ttft_p50_ms, view.ttft_p95_ms, targets.ttft]);
  charts.tpot.add(data.time, [view.tpot_p50_ms, view.tpot_p95_ms, targets.tpot]);
  showSplit(data);
  showInstances(stats.gpu_instances);
  showRequests(stats.recent?.requests ?? []);
  showEvents(stats.recent?.events ?? []);
  showLinks(stats.kv_transfer?.links ?? {});
}

function showStatus(data) {
  const instances = Object.values(data.stats?.gpu_instances ?? {});
  const missing = instances.filter((instance) => instance.status !== "ready").length;
  let state = "ready";
  if (data.server.draining) state = "draining";
  else if (data.server.restarting) state = "restarting";
  else if (!data.stats) state = "dead";
  else if (missing) state = missing === instances.length ? "starting" : "degraded";
  by("status").textContent = state;
  by("status").className = `pill ${state}`;
  by("uptime").textContent = `up ${duration(data.server.uptime_s)}`;
}

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function showTiles(data, view, queues, metrics, targets) {
  const running = (queues.prefilling ?? 0) + (queues.transferring ?? 0) + (queues.decoding ?? 0);
  const late = (value, target) => target != null && value > target;
  const target = (value) => (value == null ? "no target" : `target ${number(value, 1)} ms`);
  const counts = data.stats.cpu_scheduler;
  const tiles = [
    ["Running", number(running), `${number(counts.completed_requests)} completed`],
    ["Waiting", number((queues.waiting ?? 0) + data.server.waiting_for_turn), `oldest ${number(metrics.queues?.oldest_wait_s ?? 0, 1)} s`],
    ["Output", `${number(view.decode_throughput)}`, "tokens/s"],
    ["Prompts", `${number(view.prefill_throughput)}`, `tokens/s; ${number(100 * (view.prefix_hit_rate ?? 0))} % were cached`],
    ["TTFT p95", `${number(view.ttft_p95_ms, view.ttft_p95_ms < 100 ? 1 : 0)} ms`, target(targets.ttft), late(view.ttft_p95_ms, targets.ttft)],
    ["TPOT p95", `${number(view.tpot_p95_ms, view.tpot_p95_ms < 100 ? 1 : 0)} ms`, target(targets.tpot), late(view.tpot_p95_ms, targets.tpot)],
    ["KV in use", `${number(100 * (metrics.queues?.kv_usage ?? 0), 1)} %`, "of the fullest pool"],
    ["Failed", number(counts.failed_requests), `${number(counts.retries)} retries, ${number(counts.preemptions)} preemptions`, counts.failed_requests > 0],
  ];
  const box = by("tiles");
  if (box.children.length !== tiles.length) {
    box.replaceChildren(...tiles.map(() => {
      const tile = text("div", null, "tile");
      tile.append(text("div", "", "name"), text("div", "", "value"), text("div", "", "note"));
      return tile;
    }));
  }
  tiles.forEach(([name, value, note, isLate], index) => {
    const tile = box.children[index];
    tile.classList.toggle("late", isLate === true);
    [name, value, note].forEach((content, part) => { tile.children[part].textContent = content; });
  });
}

// If workers share a GPU, the share that each phase has; else how busy each worker is.
function sharesOf(data) {
  const instances = Object.entries(data.stats.gpu_instances);
  const sharing = instances.filter(([, instance]) => instance.shares);
  if (!sharing.length) return Object.fromEntries(instances.map(([name, instance]) => [name, 100 * (instance.busy_share ?? 0)]));
  const named = (name, phase) => (sharing.length > 1 ? `${name} ${phase}` : phase);
  return Object.fromEntries(sharing.flatMap(([name, instance]) =>
    Object.entries(instance.shares).map(([phase, share]) => [named(name, phase), share])));
}

function showSplit(data) {
  const shares = sharesOf(data);
  const names = Object.keys(shares);
  if (names.join() !== lastSplitNames) {
    lastSplitNames = names.join();
    charts.split.build(names.map((label, index) => ({ label, color: PALETTE[index % PALETTE.length], fill: names.length < 3 })));
    by("split-unit").textContent = Object.values(data.stats.gpu_instances).some((instance) => instance.shares) ? "share of the GPU while both phases are busy, %" : "busy share of each worker, %";
  }
  charts.split.add(data.time, Object.values(shares));
}

function meter(name, value, share, className) {
  const box = text("div");
  const line = text("div", null, "meter-name");
  line.append(text("span", name), text("span", value));
  const bar = text("div", null, `meter ${className}`);
  const fill = text("i");
  fill.style.width = `${Math.min(100, 100 * share)}%`;
  bar.append(fill);
  box.append(line, bar);
  return box;
}

function showInstances(instances) {
  by("instances").replaceChildren(...Object.entries(instances).map(([name, instance]) => {
    const card = text("article", null, `card ${instance.status}`);
    const head = text("header");
    head.append(text("span", name), text("span", instance.status, `pill ${instance.status}`));
    card.append(head, meter("busy", `${number(100 * (instance.busy_share ?? 0))} %`, instance.busy_share ?? 0, ""));
    if (instance.kv_blocks) {
      const used = instance.kv_blocks.total - instance.kv_blocks.free;
      card.append(meter("KV blocks", `${number(used)} of ${number(instance.kv_blocks.total)}`, used / instance.kv_blocks.total, "kv"));
    }
    const workers = Object.entries(instance.workers ?? {});
    for (const phase of new Set(workers.map(([, worker]) => worker.role))) {
      const box = text("div", null, "levels");
      box.append(text("span", `${phase} share levels`, "muted"));
      for (const [id, worker] of workers.filter(([, worker]) => worker.role === phase)) {
        const level = text("span", `${worker.percentage} %`, `level ${worker.is_current ? "active" : ""} ${worker.status}`);
        level.title = `${id}: ${worker.status}, ${number(worker.steps)} steps`;
        box.append(level);
      }
      card.append(box);
    }
    const list = text("dl");
    const rows = [["role", instance.is_mixed ? `${instance.role}, mixed` : instance.role], ["requests", number(instance.active_requests)], ["steps", number(instance.steps)]];
    if (instance.device) rows.push(["device", instance.device]);
    if (instance.restarts) rows.push(["restarts", number(instance.restarts)]);
    if (instance.why_lost) rows.push(["reason", instance.why_lost]);
    for (const [term, value] of rows) list.append(text("dt", term), text("dd", value));
    card.append(list);
    return card;
  }));
}

// --- requests ----------------------------------------------------------------------------------

let opened = null;

function phasesOf(request) {
  const end = request.ended ?? 0;
  const points = [
    ["queued", request.arrived, request.admitted ?? end],
    ["prefill", request.admitted, request.prefilled ?? end],
    ["transfer", request.prefilled, request.decode_began ?? end],
    ["decode", request.decode_began, end],
  ];
  return points.filter(([, from]) => from != null).map(([name, from, to]) => ({ name, from, to, ms: from - to }));
}

function showRequests(requests) {
  by("requests-empty").hidden = requests.length > 0;
  const list = by("requests");
  const focused = document.activeElement?.dataset?.request;
  const scroll = list.scrollTop;
  list.replaceChildren(...requests.map(requestRow));
  list.scrollTop = scroll;
  if (focused) list.querySelector(`button[data-request="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function requestRow(request) {
  const item = text("li", null, request.success === false ? "failed" : "");
  const button = text("button");
  button.type = "button";
  button.dataset.request = request.id;
  button.setAttribute("aria-expanded", String(opened === request.id));
  const track = text("span", null, "track");
  const end = request.ended ?? 0;
  const whole = Math.max(request.arrived - end, 0.01);
  const place = (ago) => `${(100 * (request.arrived - ago)) / whole}%`;
  const phases = phasesOf(request);
  for (const phase of phases) {
    const bar = text("i", null, phase.name);
    bar.style.left = place(phase.from);
    bar.style.width = `${(100 * phase.ms) / whole}%`;
    bar.title = `${phase.name} ${number(phase.ms, 1)} ms`;
    track.append(bar);
  }
  for (const chunk of request.chunks.slice(0, -1)) {
    const cut = text("b");
    cut.style.left = place(chunk);
    track.append(cut);
  }
  const state = request.ended == null ? phases.at(-1)?.name ?? "" : request.success ? "" : "not completed";
  button.append(
    text("span", `#${request.id}`, "number"),
    track,
    text("span", `${number(request.prompt_tokens)} in, ${number(whole, 0)} ms ${state}`, "figures"),
  );
  button.addEventListener("click", () => {
    opened = opened === request.id ? null : request.id;
    refresh();
  });
  item.append(button);
  if (opened === request.id) item.append(details(request, phases));
  return item;
}

function details(request, phases) {
  const box = text("div", null, "details");
  const facts = phases.map((phase) => [phase.name, `${number(phase.ms, 2)} ms`]);
  facts.push(["prompt", `${number(request.prompt_tokens)} tokens, ${number(request.cached_tokens)} cached, ${request.chunks.length} chunk${request.chunks.length === 1 ? "" : "s"}`]);
  if (request.ended != null) facts.push(["output", `${number(request.output_tokens)} tokens`]);
  if (request.ttft_ms != null) facts.push(["TTFT", `${number(request.ttft_ms, 2)} ms`]);
  if (request.tpot_ms != null) facts.push(["TPOT", `${number(request.tpot_ms, 2)} ms`]);
  if (request.preemptions) facts.push(["preempted", `${request.preemptions} times`]);
  if (request.retries) facts.push(["retried", `${request.retries} times`]);
  for (const [name, value] of facts) {
    const fact = text("span", `${name} `);
    fact.append(text("b", value));
    box.append(fact);
  }
  return box;
}

function moveFocus(step) {
  const buttons = [...by("requests").querySelectorAll("button")];
  if (!buttons.length) return;
  const at = buttons.indexOf(document.activeElement);
  buttons[Math.min(buttons.length - 1, Math.max(0, at + step))].focus();
}

// --- events and links --------------------------------------------------------------------------

let lastEvent = 0;

function showEvents(events) {
  by("events-empty").hidden = events.length > 0;
  const newest = events.at(-1)?.number ?? 0;
  if (newest === lastEvent) return;
  if (newest < lastEvent) by("events").replaceChildren(); // another scheduler
  const known = newest < lastEvent ? 0 : lastEvent;
  lastEvent = newest;
  for (const event of events.filter((event) => event.number > known)) {
    const item = text("li", null, event.kind);
    const when = new Date(event.time * 1000);
    const time = text("time", clock(event.time));
    time.dateTime = when.toISOString();
    item.append(time, text("span", event.kind, "kind"), text("span", `${event.subject}: ${event.text}`, "what"));
    by("events").prepend(item);
  }
}

function showLinks(links) {
  const rows = Object.entries(links);
  by("links").hidden = rows.length === 0;
  by("links-empty").hidden = rows.length > 0;
  by("links").tBodies[0].replaceChildren(...rows.map(([name, link]) => {
    const row = text("tr");
    const failures = Object.values(link.failures ?? {}).reduce((sum, count) => sum + count, 0);
    const cells = [name.replace("->", " → "), number(link.transfers), bytes(link.bytes), `${number(link.gb_per_s, 2)} GB/s`, number(failures)];
    row.append(...cells.map((cell) => text("td", cell)));
    return row;
  }));
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${number(count, 1)} ${units[unit]}`;
}

// --- administration ----------------------------------------------------------------------------

const ROLE_TIMEOUT_S = 120; // for a worker to finish its requests

async function administrate(path, body, timeoutMs) {
  const answer = by("admin-answer");
  answer.textContent = "…";
  try {
    await ask(path, { method: "POST", key: by("admin-key").value, body, timeoutMs });
    answer.textContent = "Done.";
  } catch (error) {
    answer.textContent = `Refused: ${error.message}`;
  }
}

function openAdmin() {
  by("admin-answer").textContent = "";
  const shared = Object.values(last?.stats?.gpu_instances ?? {}).find((instance) => instance.shares);
  by("split-fields").hidden = shared == null;
  for (const [phase, share] of Object.entries(shared?.shares ?? {})) by(`split-${phase}`).value = share;
  by("split-mixed").checked = shared?.is_mixed ?? false;
  by("split-mixed").disabled = !Object.values(shared?.workers ?? {}).some((worker) => worker.role === "unified");
  showRoles();
  by("admin-dialog").showModal();
}

const otherRole = (role) => ({ prefill: "decode", decode: "prefill" })[role];

// For workers of one phase each. Each phase must keep a worker, so at least three are needed.
function showRoles() {
  const workers = Object.entries(last?.stats?.gpu_instances ?? {}).filter(([, instance]) => otherRole(instance.role));
  by("role-fields").hidden = workers.length < 3;
  const list = by("role-instance");
  const labels = workers.map(([name, instance]) => `${name}: ${instance.role} to ${otherRole(instance.role)}`);
  if (labels.join() === [...list.options].map((option) => option.text).join()) return;
  const chosen = list.value;
  list.replaceChildren(...workers.map(([name], index) => new Option(labels[index], name)));
  if (workers.some(([name]) => name === chosen)) list.value = chosen;
}

function changeRole() {
  const name = by("role-instance").value;
  const role = otherRole(last.stats.gpu_instances[name].role);
  administrate(`/v1/instances/${encodeURIComponent(name)}/role`, { role, timeout_s: ROLE_TIMEOUT_S }, 1000 * ROLE_TIMEOUT_S + TIMEOUT_MS);
}

// --- the loop ----------------------------------------------------------------------------------

let paused = false;
let last = null;

function refresh() {
  if (last?.stats) showRequests(last.stats.recent?.requests ?? []);
}

function setPaused(value) {
  paused = value;
  by("pause").setAttribute("aria-pressed", String(paused));
  by("pause").textContent = paused ? "Resume" : "Pause";
}

async function poll() {
  if (!paused && !document.hidden) {
    try {
      if (!by("model").textContent) by("model").textContent = (await ask("/v1/models")).data[0].id;
      last = await ask("/live");
      show(last);
      if (by("admin-dialog").open) showRoles();
    } catch (error) {
      by("status").textContent = "no answer";
      by("status").className = "pill dead";
      const needsKey = error.status === 401;
      say(needsKey ? "This server requires an API key." : `The server does not answer: ${error.message}`, needsKey);
      if (needsKey && keyIsWanted) askForKey();
    }
  }
  setTimeout(poll, POLL_MS);
}

by("key-cancel").addEventListener("click", () => by("key-dialog").close("cancel"));
by("pause").addEventListener("click", () => setPaused(!paused));
by("admin-open").addEventListener("click", openAdmin);
by("key-open").addEventListener("click", askForKey);
by("role-apply").addEventListener("click", changeRole);
by("drain").addEventListener("click", () => administrate("/admin/drain", {}));
by("split-apply").addEventListener("click", () => administrate("/v1/semi_pd/allocation", {
  prefill_percentage: Number(by("split-prefill").value),
  decode_percentage: Number(by("split-decode").value),
  mixed: by("split-mixed").checked,
}));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { p: () => setPaused(!paused), a: openAdmin, j: () => moveFocus(1), k: () => moveFocus(-1) }[event.key.toLowerCase()];
  if (act) { event.preventDefault(); act(); }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload()); // charts keep their colours

makeCharts();
poll();
