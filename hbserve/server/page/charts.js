// The charts: ten minutes of samples, which outlive a reload of the page.

import { by, clock, kept, number } from "./dom.js";

const KEEP_S = 600;
const GAP_S = 5; // lines break where the page was paused or away for longer
const WHOLE_STEPS = [1, 2, 5].flatMap((step) => [...Array(12).keys()].map((power) => step * 10 ** power)).sort((a, b) => a - b);
const PALETTE = ["prefill", "decode", "transfer", "bad", "queued", "good"];

const short = (value, digits) =>
  value < 10000 ? number(value, digits) : value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 });

const style = getComputedStyle(document.documentElement);
const color = (name) => style.getPropertyValue(`--${name}`).trim();

const all = {};
const before = kept("history", () => Object.fromEntries(Object.entries(all).map(([name, chart]) => [name, chart.samples])));

class Chart {
  // Options: max of the y-axis; whole, if its values are whole numbers; height.
  constructor(name, series, options = {}) {
    this.box = by(`chart-${name}`);
    this.options = options;
    this.samples = before?.[name] ?? { time: [], values: {} };
    this.build(series);
    new ResizeObserver(() => this.plot.setSize(this.size())).observe(this.box);
    all[name] = this;
  }

  build(series) {
    this.plot?.destroy();
    this.labels = series.map((line) => line.label);
    const whole = this.options.whole;
    const axis = { stroke: color("muted"), grid: { stroke: color("line"), width: 1 }, ticks: { stroke: color("line"), width: 1 } };
    const yAxis = { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => short(tick, whole ? 0 : 2)) };
    if (whole) yAxis.incrs = WHOLE_STEPS;
    this.plot = new uPlot({
      ...this.size(),
      cursor: { y: false, points: { size: 6 } },
      scales: { x: { time: true, range: (_, low, high) => xRange(low, high) }, y: { range: (_, low, high) => [0, this.top(high)] } },
      axes: [{ ...axis, space: 90, values: (_, ticks) => ticks.map(clock) }, yAxis],
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
    }, this.columns(), this.box);
    this.draw();
  }

  // The samples of the present lines. A line that is new has none from before.
  columns() {
    return [this.samples.time, ...this.labels.map((label) => this.samples.values[label] ?? this.samples.time.map(() => null))];
  }

  top(high) {
    if (this.options.max) return this.options.max;
    if (this.options.whole) return Math.max(Math.ceil((high ?? 0) * 1.15), 4);
    return high == null ? 100 : high * 1.15;
  }

  size() {
    return { width: Math.max(200, this.box.clientWidth), height: this.options.height ?? 190 };
  }

  add(seconds, values) {
    const { time } = this.samples;
    if (time.length && seconds - time.at(-1) > GAP_S) this.push(time.at(-1) + 1, []);
    this.push(seconds, values);
    const old = time.findIndex((moment) => moment > seconds - KEEP_S);
    if (old > 0) [time, ...Object.values(this.samples.values)].forEach((column) => column.splice(0, old));
    this.draw();
  }

  push(seconds, values) {
    const columns = this.samples.values;
    this.labels.forEach((label) => { columns[label] ??= this.samples.time.map(() => null); });
    this.samples.time.push(seconds);
    for (const [label, column] of Object.entries(columns)) column.push(values[this.labels.indexOf(label)] ?? null);
  }

  draw() {
    this.plot.setData(this.columns());
    const count = this.samples.time.length;
    if (count && this.plot.cursor.idx == null) this.plot.setLegend({ idx: count - 1 }); // the newest, unless the pointer is on the chart
  }
}

function xRange(low, high) {
  const end = high ?? Date.now() / 1000;
  return [Math.min(low ?? end, end - 60), end];
}

export function makeCharts() {
  const chart = {};
  chart.throughput = new Chart("throughput", [
    { label: "prefill", color: "prefill", fill: true },
    { label: "decode", color: "decode", fill: true },
  ], { whole: true });
  chart.queues = new Chart("queues", [
    { label: "waiting", color: "queued", fill: true },
    { label: "prefilling", color: "prefill" },
    { label: "transferring", color: "transfer" },
    { label: "decoding", color: "decode" },
  ], { whole: true });
  for (const name of ["ttft", "tpot"]) {
    chart[name] = new Chart(name, [
      { label: "p50", color: "decode" },
      { label: "p95", color: "prefill" },
      { label: "target", color: "bad", dash: [6, 5] },
    ]);
  }
  chart.shares = new Chart("shares", [], { height: 170, max: 100, whole: true });
  return chart;
}

// Shows shares by name; the lines follow the names.
export function addShares(chart, seconds, shares) {
  const names = Object.keys(shares);
  if (names.join() !== chart.labels.join()) {
    chart.build(names.map((label, index) => ({ label, color: PALETTE[index % PALETTE.length], fill: names.length < 3 })));
  }
  chart.add(seconds, Object.values(shares));
}
