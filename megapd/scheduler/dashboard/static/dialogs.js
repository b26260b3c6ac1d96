// The two dialogs: the token, and the confirmation of a change to a run's schedule. <dialog> keeps the focus inside.

import { Away, Refused, ask, setToken, token } from "./api.js";

const AHEAD_SECONDS = 30; // of the run's own pace, that a change begins after it is confirmed: time to read, and to agree on the step
const AHEAD_STEPS = 10;

const TEXTS = {
  pause: ["Pause", "The checkpoint that teaches just before that step goes on teaching, until the schedule is resumed."],
  advance: ["Advance", "The next rotation takes place at that step; those after it stay where they were."],
  pin: ["Pin", "One checkpoint of the trajectory teaches from that step on, until the schedule is resumed."],
  resume: ["Resume", "The newest version that was set by a configuration or a person, not by these controls, is in force again."],
};

const at = (id) => document.getElementById(id);

export function setUpToken(changed) {
  const dialog = at("token-dialog");
  const done = (value) => {
    setToken(value);
    at("token").value = "";
    dialog.close();
    changed();
  };
  at("token-open").addEventListener("click", () => openToken(""));
  at("token-cancel").addEventListener("click", () => dialog.close());
  at("token-forget").addEventListener("click", () => done(""));
  at("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const value = at("token").value.trim();
    // A header holds no other characters, and fetch's own complaint would name the token.
    if (/^[\x21-\x7e]+$/.test(value)) done(value);
    else at("token-error").textContent = "A token has no spaces and no letters beyond ASCII; copy it again.";
  });
}

export function openToken(error) {
  at("token-error").textContent = error;
  at("token-forget").hidden = !token();
  if (!at("token-dialog").open) at("token-dialog").showModal();
  at("token").focus();
}

// changed(name): called after a change was made, or was refused because of one.
export function setUpControl(changed) {
  const dialog = at("control-dialog");
  let asked = null;
  let busy = false;

  dialog.addEventListener("cancel", (event) => {
    if (busy) event.preventDefault(); // its answer would be lost
  });
  at("control-close").addEventListener("click", () => dialog.close());
  at("control-checkpoint").addEventListener("change", () => offerAccept());
  at("control-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy || asked === null) return;
    showBusy(true);
    at("control-error").textContent = "";
    try {
      const body = { action: asked.action, expected: asked.expected, effective: Number(at("control-effective").value) };
      if (asked.action === "pin") body.checkpoint = Number(at("control-checkpoint").value);
      if (at("control-accept").checked) body.accept = true;
      const made = await ask(`/v1/runs/${encodeURIComponent(asked.run.name)}/control`, body);
      finish(`Done: version ${made.version} of the schedule (${made.document.policy}) begins at student step ${made.effective}.`);
      changed(asked.run.name);
    } catch (error) {
      refuse(error);
    } finally {
      showBusy(false);
    }
  });

  function showBusy(on) {
    busy = on;
    at("control-confirm").disabled = at("control-close").disabled = on;
    if (!on) (asked.done ? at("control-close") : at("control-confirm")).focus();
  }

  function finish(told) {
    asked.done = true;
    at("control-result").textContent = told;
    at("control-confirm").hidden = true;
    at("control-close").textContent = "Close";
    for (const field of dialog.querySelectorAll("input, select")) field.disabled = true;
  }

  function refuse(error) {
    let told = error.message;
    if (error instanceof Refused && error.status === 409) {
      asked.expected = error.current?.version ?? asked.expected;
      told += `. It is at version ${asked.expected} now; close this to look at it, or confirm again to change that one.`;
      changed(asked.run.name);
    } else if (error instanceof Refused && error.status === 422 && /flagged/.test(told)) {
      at("control-accept-field").hidden = false;
    } else if (error instanceof Away) {
      told = `${told}. The change may have been made all the same; confirming again does not make it twice.`;
    } else if (!(error instanceof Refused)) {
      throw error;
    }
    at("control-error").textContent = told;
  }

  function offerAccept() {
    const chosen = at("control-checkpoint").selectedOptions[0];
    const flagged = asked.action === "pin" && chosen?.dataset.flagged === "yes";
    at("control-accept-field").hidden = !flagged;
    if (!flagged) at("control-accept").checked = false;
  }

  // pace: student steps a second; teaching: the present checkpoint's step, or null.
  return function open(action, run, checkpoints, pace, teaching) {
    asked = { action, run, expected: run.schedule_version, done: false };
    const [verb, text] = TEXTS[action];
    at("control-title").textContent = `${verb}: ${run.name}`;
    at("control-text").textContent = text;
    for (const field of dialog.querySelectorAll("input, select")) field.disabled = false;
    const effective = at("control-effective");
    effective.min = Math.max(run.step + 1, 1);
    effective.max = run.steps - 1;
    const ahead = Math.max(AHEAD_STEPS, Math.ceil(pace * AHEAD_SECONDS));
    effective.value = Math.max(Math.min(Math.max(run.step, 0) + ahead, run.steps - 1), effective.min);
    const choice = at("control-checkpoint");
    at("control-checkpoint-field").hidden = action !== "pin";
    choice.replaceChildren(
      ...checkpoints.map((checkpoint) => {
        const open = checkpoint.flags.filter((flag) => flag.accepted_by === null);
        const option = new Option(open.length ? `${checkpoint.step} (flagged: ${open.map((f) => f.kind).join(", ")})` : checkpoint.step);
        option.value = checkpoint.step;
        option.dataset.flagged = open.length ? "yes" : "no";
        option.selected = checkpoint.step === teaching;
        return option;
      }),
    );
    at("control-accept").checked = false;
    at("control-confirm").hidden = false;
    at("control-confirm").textContent = `${verb} it`;
    at("control-close").textContent = "Cancel";
    at("control-error").textContent = action === "pin" && !checkpoints.length ? "No checkpoint is registered for this run." : "";
    at("control-result").textContent = "";
    offerAccept();
    dialog.showModal();
    (action === "pin" ? choice : effective).focus();
  };
}
