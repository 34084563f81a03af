// The last requests, as bars on one time axis. Times of a request are milliseconds before now.

import { by, clock, duration, number, text } from "./dom.js";

const MAX_MEDIANS = 25; // length of the axis in median durations, so that a usual bar is wide enough to read
const STEPS = [1, 2, 5].flatMap((step) => [...Array(9).keys()].map((power) => step * 10 ** power)).sort((a, b) => a - b);

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

// The axis ends at the latest end of a request, or now while one is open.
function axisOf(requests) {
  const end = Math.min(...requests.map((request) => request.ended ?? 0));
  const durations = requests.map((request) => request.arrived - (request.ended ?? 0)).sort((a, b) => a - b);
  const whole = Math.max(...requests.map((request) => request.arrived)) - end;
  const span = Math.max(1, Math.min(whole, MAX_MEDIANS * durations[durations.length >> 1]));
  return { end, span, place: (ago) => (100 * (end + span - ago)) / span };
}

export function showRequests(requests, now) {
  by("requests-empty").hidden = requests.length > 0;
  by("requests-axis").hidden = requests.length === 0;
  const list = by("requests");
  const focused = document.activeElement?.dataset?.request;
  const scroll = list.scrollTop;
  const axis = requests.length ? axisOf(requests) : null;
  if (axis) showAxis(axis, now);
  list.replaceChildren(...requests.map((request) => requestRow(request, axis, () => showRequests(requests, now))));
  list.scrollTop = scroll;
  if (focused) list.querySelector(`button[data-request="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function showAxis(axis, now) {
  const step = STEPS.find((step) => step >= axis.span / 4);
  const ticks = [text("span", clock(now - axis.end / 1000))];
  for (let ago = step; ago < 0.9 * axis.span; ago += step) {
    const tick = text("span", `−${duration(ago / 1000)}`);
    tick.style.left = `${axis.place(axis.end + ago)}%`;
    ticks.push(tick);
  }
  by("requests-ticks").replaceChildren(...ticks);
}

function requestRow(request, axis, redraw) {
  const item = text("li", null, request.success === false ? "failed" : "");
  const button = text("button");
  button.type = "button";
  button.dataset.request = request.id;
  button.setAttribute("aria-expanded", String(opened === request.id));
  const phases = phasesOf(request);
  const state = request.ended == null ? phases.at(-1)?.name ?? "" : request.success ? "" : "not completed";
  button.append(
    text("span", `#${request.id}`, "number"),
    track(request, phases, axis),
    text("span", `${number(request.prompt_tokens)} in, ${duration((request.arrived - (request.ended ?? 0)) / 1000)} ${state}`, "figures"),
  );
  button.addEventListener("click", () => {
    opened = opened === request.id ? null : request.id;
    redraw();
  });
  item.append(button);
  if (opened === request.id) item.append(details(request, phases));
  return item;
}

function track(request, phases, axis) {
  const box = text("span", null, "track");
  if (request.ended != null && axis.place(request.ended) <= 0) {
    box.append(text("em", `◂ ended ${duration((request.ended - axis.end) / 1000)} before`));
    return box;
  }
  for (const phase of phases) {
    const from = Math.max(0, axis.place(phase.from));
    const bar = text("i", null, phase.name);
    bar.style.left = `min(${from}%, 100% - 2px)`;
    bar.style.width = `${Math.max(0, axis.place(phase.to) - from)}%`;
    bar.title = `${phase.name} ${number(phase.ms, 1)} ms`;
    if (axis.place(phase.to) >= 0) box.append(bar);
  }
  for (const chunk of request.chunks.slice(0, -1)) {
    const cut = text("b");
    cut.style.left = `${axis.place(chunk)}%`;
    box.append(cut);
  }
  return box;
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

export function moveFocus(step) {
  const buttons = [...by("requests").querySelectorAll("button")];
  if (!buttons.length) return;
  const at = buttons.indexOf(document.activeElement);
  buttons[Math.min(buttons.length - 1, Math.max(0, at + step))].focus();
}
