// Small helpers: elements, numbers, times, and what the tab keeps over a reload.

export const by = (id) => document.getElementById(id);

export const number = (value, digits = 0) =>
  value == null || Number.isNaN(value) ? "–" : Number(value).toLocaleString("en", { maximumFractionDigits: digits });

// Percentiles of no samples are 0; no latency is.
export const measured = (value) => (value > 0 ? value : null);

export function latency(ms) {
  if (measured(ms) == null) return "–";
  return ms < 10000 ? `${number(ms, ms < 100 ? 1 : 0)} ms` : `${number(ms / 1000, 1)} s`;
}

export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

export function duration(seconds) {
  if (seconds < 1) return `${number(1000 * seconds)} ms`;
  if (seconds < 120) return `${number(seconds, seconds < 10 ? 1 : 0)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${number(count, 1)} ${units[unit]}`;
}

export const text = (tag, content, className) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (content != null) element.textContent = content;
  return element;
};

export const storage = {
  get: (name) => sessionStorage.getItem(name) || "",
  set: (name, value) => sessionStorage.setItem(name, value),
};

// A value that the tab keeps: read at the start, written when the page is left.
export function kept(name, value) {
  addEventListener("pagehide", () => {
    try { storage.set(name, JSON.stringify(value())); } catch { /* the tab's storage is full: nothing is kept */ }
  });
  try { return JSON.parse(storage.get(name) || "null"); } catch { return null; }
}
