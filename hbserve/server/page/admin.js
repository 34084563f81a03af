// The dialog of administration: split, roles, drain.

import { by } from "./dom.js";
import { TIMEOUT_MS, ask } from "./server.js";

const ROLE_TIMEOUT_S = 120; // for a worker to finish its requests

let instances = {};

export function setInstances(present) {
  instances = present;
  if (by("admin-dialog").open) showRoles();
}

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

export function openAdmin() {
  by("admin-answer").textContent = "";
  const shared = Object.values(instances).find((instance) => instance.shares);
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
  const workers = Object.entries(instances).filter(([, instance]) => otherRole(instance.role));
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
  const role = otherRole(instances[name].role);
  administrate(`/v1/instances/${encodeURIComponent(name)}/role`, { role, timeout_s: ROLE_TIMEOUT_S }, 1000 * ROLE_TIMEOUT_S + TIMEOUT_MS);
}

by("admin-open").addEventListener("click", openAdmin);
by("role-apply").addEventListener("click", changeRole);
by("drain").addEventListener("click", () => administrate("/admin/drain", {}));
by("split-apply").addEventListener("click", () => administrate("/v1/semi_pd/allocation", {
  prefill_percentage: Number(by("split-prefill").value),
  decode_percentage: Number(by("split-decode").value),
  mixed: by("split-mixed").checked,
}));
