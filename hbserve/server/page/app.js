// The live page: polls /live once a second and draws the answer. No framework, no build step.

import { openAdmin, setInstances } from "./admin.js";
import { addShares, makeCharts } from "./charts.js";
import { by, bytes, duration, latency, measured, number, text } from "./dom.js";
import { showEvents } from "./events.js";
import { moveFocus, showRequests } from "./requests.js";
import { ask, askForKey, keyIsWanted } from "./server.js";

const POLL_MS = 1000;
const charts = makeCharts();

const CHOSEN_BY = { auto: ", chosen for this machine", configuration: ", as configured", operator: ", chosen by an operator" };

function say(problem, needsKey = false) {
  by("problem").hidden = problem == null;
  by("problem-text").textContent = problem ?? "";
  by("key-open").hidden = !needsKey;
}

function show(data) {
  const stats = data.stats;
  say(data.error);
  showHeader(data);
  if (!stats) return;
  const metrics = stats.metrics ?? {};
  const view = metrics.window ?? {};
  const queues = metrics.queues?.requests ?? {};
  const { ttft_ms: ttftTarget, tpot_ms: tpotTarget } = data.targets;
  setInstances(stats.gpu_instances);
  showTiles(data, view, queues, metrics);
  charts.throughput.add(data.time, [view.prefill_throughput, view.decode_throughput]);
  charts.queues.add(data.time, [queues.waiting, queues.prefilling, queues.transferring, queues.decoding]);
  charts.ttft.add(data.time, [measured(view.ttft_p50_ms), measured(view.ttft_p95_ms), ttftTarget]);
  charts.tpot.add(data.time, [measured(view.tpot_p50_ms), measured(view.tpot_p95_ms), tpotTarget]);
  showShares(data);
  showInstances(stats.gpu_instances);
  showRequests(stats.recent?.requests ?? [], data.time);
  showEvents(stats.recent?.events ?? []);
  showLinks(stats.kv_transfer?.links ?? {});
  showTiers(stats.kv_tiers ?? {});
}

function showHeader(data) {
  const instances = Object.values(data.stats?.gpu_instances ?? {});
  const missing = instances.filter((instance) => instance.status !== "ready").length;
  let state = "ready";
  if (data.server.draining) state = "draining";
  else if (data.server.restarting) state = "restarting";
  else if (!data.stats) state = "dead";
  else if (missing) state = missing === instances.length ? "starting" : "degraded";
  by("status").textContent = state;
  by("status").className = `pill ${state}`;
  by("model").textContent = data.server.model;
  const plan = data.server.plan;
  by("mode").textContent = data.server.mode + (plan ? CHOSEN_BY[plan.chosen_by] : "");
  by("mode").title = plan?.why ?? "";
  by("uptime").textContent = `HBServe ${data.server.version}, up ${duration(data.server.uptime_s)}`;
}

function showTiles(data, view, queues, metrics) {
  const { ttft_ms: ttftTarget, tpot_ms: tpotTarget } = data.targets;
  const running = (queues.prefilling ?? 0) + (queues.transferring ?? 0) + (queues.decoding ?? 0);
  const waiting = (queues.waiting ?? 0) + data.server.waiting_for_turn;
  const late = (value, target) => target != null && value > target;
  const target = (value) => (value == null ? "no target" : `target ${number(value, 1)} ms`);
  const counts = data.stats.cpu_scheduler;
  const tiles = [
    ["Running", number(running), `${number(counts.completed_requests)} completed`],
    ["Waiting", number(waiting), `oldest ${queues.waiting ? duration(metrics.queues.oldest_wait_s) : "–"}`],
    ["Output", number(view.decode_throughput), "tokens/s"],
    ["Prompts", number(view.prefill_throughput), `tokens/s, ${view.prefill_throughput || view.prefix_hit_rate ? `${number(100 * view.prefix_hit_rate)} %` : "–"} cached`],
    ["TTFT p95", latency(view.ttft_p95_ms), target(ttftTarget), late(view.ttft_p95_ms, ttftTarget)],
    ["TPOT p95", latency(view.tpot_p95_ms), target(tpotTarget), late(view.tpot_p95_ms, tpotTarget)],
    ["KV in use", `${number(100 * (metrics.queues?.kv_usage ?? 0), 1)} %`, "of the fullest pool"],
    ["Failed", number(counts.failed_requests), `retries ${number(counts.retries)}, preemptions ${number(counts.preemptions)}`, counts.failed_requests > 0],
    ...draftTile(counts.speculation),
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

// Right guesses of a draft, and how often each drafter is right; nothing where no draft has been verified.
function draftTile(speculation) {
  const used = Object.entries(speculation ?? {}).filter(([, drafter]) => drafter.drafted_tokens > 0);
  if (!used.length) return [];
  const sum = (name) => used.reduce((total, [, drafter]) => total + drafter[name], 0);
  const share = ([name, drafter]) => `${name} ${number(100 * drafter.accepted_tokens / drafter.drafted_tokens)} %`;
  return [["Right per draft", number(sum("accepted_tokens") / sum("drafts"), 1), used.map(share).join(", ")]];
}

// If workers share a GPU, the share that each phase has; else how busy each worker is.
function showShares(data) {
  const instances = Object.entries(data.stats.gpu_instances);
  const sharing = instances.filter(([, instance]) => instance.shares);
  by("shares-title").textContent = sharing.length ? "Split over time" : "Busy share";
  by("shares-unit").textContent = sharing.length ? "share of the GPU while both phases are busy, %" : "of each worker, %";
  const named = (name, phase) => (sharing.length > 1 ? `${name} ${phase}` : phase);
  const shares = sharing.length
    ? sharing.flatMap(([name, instance]) => Object.entries(instance.shares).map(([phase, share]) => [named(name, phase), share]))
    : instances.map(([name, instance]) => [name, 100 * (instance.busy_share ?? 0)]);
  addShares(charts.shares, data.time, Object.fromEntries(shares));
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

function showLinks(links) {
  const rows = Object.entries(links);
  by("links").hidden = rows.length === 0;
  by("links-empty").hidden = rows.length > 0;
  by("links").tBodies[0].replaceChildren(...rows.map(([name, link]) => {
    const row = text("tr");
    const failures = Object.values(link.failures ?? {}).reduce((sum, count) => sum + count, 0);
    const cells = [name.replace("->", " → "), number(link.transfers), bytes(link.bytes), measured(link.gb_per_s) == null ? "–" : `${number(link.gb_per_s, 2)} GB/s`, number(failures)];
    row.append(...cells.map((cell) => text("td", cell)));
    return row;
  }));
}

// Memory beside the devices that keeps KV; hidden where there is none.
function showTiers(tiers) {
  const rows = Object.entries(tiers);
  by("tiers").hidden = rows.length === 0;
  by("tiers").querySelector("tbody").replaceChildren(...rows.map(([name, tier]) => {
    const row = text("tr");
    const failures = Object.values(tier.failures ?? {}).reduce((sum, count) => sum + count, 0);
    const share = tier.slots ? `${number((100 * tier.blocks) / tier.slots)} %` : number(tier.blocks);
    const rate = tier.load_s ? `${number(tier.loaded_bytes / tier.load_s / 1e9, 2)} GB/s` : "–";
    const cells = [name, share, bytes(tier.stored_bytes), bytes(tier.loaded_bytes), rate, number(tier.saved_prompt_tokens), number(failures)];
    row.append(...cells.map((cell) => text("td", cell)));
    return row;
  }));
}

// --- the loop ----------------------------------------------------------------------------------

let paused = false;

function setPaused(value) {
  paused = value;
  by("pause").setAttribute("aria-pressed", String(paused));
  by("pause").textContent = paused ? "Resume" : "Pause";
}

async function poll() {
  if (!paused && !document.hidden) {
    try {
      show(await ask("/live"));
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
by("key-open").addEventListener("click", askForKey);
by("pause").addEventListener("click", () => setPaused(!paused));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { p: () => setPaused(!paused), a: openAdmin, j: () => moveFocus(1), k: () => moveFocus(-1) }[event.key.toLowerCase()];
  if (act) { event.preventDefault(); act(); }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload()); // charts keep their colours

poll();
