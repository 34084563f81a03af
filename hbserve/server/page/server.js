// Requests to the server, and the key that they need.

import { by, storage } from "./dom.js";

export const TIMEOUT_MS = 8000;

export async function ask(path, options = {}) {
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

export let keyIsWanted = true; // until the user cancels the dialog

export function askForKey() {
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
