// Events, newest first. The tab keeps them over a reload, and over a restart of the scheduler, which forgets them.

import { by, clock, kept, text } from "./dom.js";

const MAX_EVENTS = 200;

const events = [];
const before = kept("events", () => events) ?? [];

export function showEvents(newest) {
  const known = events.at(-1)?.number ?? 0;
  const first = newest.at(0)?.number ?? Infinity;
  const added = [...(known ? [] : before.filter((event) => event.number < first)), ...newest.filter((event) => event.number > known)];
  events.push(...added);
  events.splice(0, events.length - MAX_EVENTS);
  by("events-empty").hidden = events.length > 0;
  const list = by("events");
  added.forEach((event) => list.prepend(row(event)));
  while (list.children.length > MAX_EVENTS) list.lastChild.remove();
}

function row(event) {
  const item = text("li", null, event.kind);
  const time = text("time", clock(event.time));
  time.dateTime = new Date(event.time * 1000).toISOString();
  item.append(time, text("span", event.kind.replaceAll("_", " "), "kind"), text("span", `${event.subject}: ${event.text}`, "what"));
  return item;
}
