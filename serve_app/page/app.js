// The page: one file at a time goes to the server, its segments appear as they are decoded, then it can be played,
// read and taken along. Holds nothing but the token, in this tab's session storage.

import { FORMATS, MEDIA_TYPES, clock, megabytes } from "./formats.js";
import { Player } from "./player.js";
import { transcribe } from "./request.js";
import { Rows } from "./rows.js";

const TOKEN = "murmuration.token";
const UNPLAYABLE = "This browser cannot play this file; its text is not affected.";
const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));

let models = []; // as /v1/models lists them; empty: not known yet
let file = null; // the one that is worked on, or was last
let isWaiting = false; // for a token or the models; the file is sent then
let cancel = null; // what ends the request under way; null: none
let transcript = null; // what can be downloaded
let isPlayable = false;
let retry = null; // what "Try again" does

const rows = new Rows(ui.rows, (segment) => {
  if (isPlayable) player.play(segment);
  else ui.note.textContent = UNPLAYABLE;
});
const player = new Player(ui.audio, {
  moved: (seconds) => rows.mark(seconds),
  playing: (isPlaying) => ui.rows.classList.toggle("playing", isPlaying),
  ready: () => {
    ui.player.hidden = false;
    showDecoded();
  },
  unplayable: () => {
    isPlayable = false;
    ui.player.hidden = true;
    ui.note.textContent = UNPLAYABLE;
  },
});

// --- the token and the models ---

async function loadModels() {
  hideProblem();
  const token = readToken();
  let answer;
  try {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const response = await fetch("v1/models", { headers, cache: "no-store" });
    if (response.status === 401 || response.status === 403) return askToken(token !== "");
    if (!response.ok) throw new Error(`status ${response.status}`);
    answer = await response.json();
  } catch {
    const detail = "Check that it runs and that you are online, then try again.";
    return showProblem({ title: "The server does not answer.", detail }, loadModels);
  }
  ui.token.hidden = true;
  ui.forget.hidden = token === "";
  models = answer.data;
  if (!models.length) {
    const detail = "Tell whoever runs it, and try again.";
    return showProblem({ title: "The server has no model.", detail }, loadModels);
  }
  offer(ui.model, models.map(({ id }) => [id, id]));
  ui.model.disabled = false;
  offerLanguages();
  if (isWaiting) {
    ui.note.textContent = "";
    start();
  }
}

function askToken(wasRefused) {
  writeToken("");
  ui.token.hidden = false;
  ui.forget.hidden = true;
  ui["token-problem"].textContent = wasRefused ? "The server did not take this token. Check it and try again." : "";
  ui["token-value"].toggleAttribute("aria-invalid", wasRefused);
  ui["token-value"].focus();
}

function useToken(event) {
  event.preventDefault();
  const token = ui["token-value"].value.trim();
  if (!/^[\x21-\x7e]+$/.test(token)) {
    ui["token-problem"].textContent = "A token has letters, digits and signs, no space within. Check it and try again.";
    return;
  }
  ui["token-value"].value = "";
  writeToken(token);
  loadModels();
}

let tokenOfPage = ""; // where the browser keeps no session storage
function readToken() {
  try {
    return sessionStorage.getItem(TOKEN) ?? tokenOfPage;
  } catch {
    return tokenOfPage;
  }
}

function writeToken(token) {
  tokenOfPage = token;
  try {
    if (token) sessionStorage.setItem(TOKEN, token);
    else sessionStorage.removeItem(TOKEN);
  } catch {
    // it is kept in this page only
  }
}

function offerLanguages() {
  const { languages = [] } = models.find(({ id }) => id === ui.model.value) ?? {};
  const named = languages.map((code) => [code, languageName(code)]);
  named.sort(([, a], [, b]) => a.localeCompare(b, "en"));
  offer(ui.language, [["", "Detect"], ...named]);
  const knowsOthers = languages.some((code) => code !== "en");
  ui.task.querySelector("[value=translate]").disabled = !knowsOthers;
  if (!knowsOthers) ui.task.value = "transcribe";
}

function languageName(code) {
  try {
    return new Intl.DisplayNames("en", { type: "language" }).of(code) ?? code;
  } catch {
    return code;
  }
}

// Fills a list of choices; what was chosen stays so where it is still offered.
function offer(select, choices) {
  const chosen = select.value;
  select.replaceChildren(...choices.map(([value, name]) => new Option(name, value)));
  select.value = choices.some(([value]) => value === chosen) ? chosen : choices[0][0];
}

// --- a file ---

function take(files) {
  if (cancel) {
    ui.note.textContent = `${file.name} is still being worked on. Cancel it first, or wait for it.`;
    return;
  }
  ui.note.textContent = "";
  if (!files.length) {
    ui.note.textContent = "There was no file in what you dropped.";
    return;
  }
  if (files.length > 1) {
    ui.note.textContent = `One recording at a time: ${files[0].name} was taken, drop the others after it.`;
  }
  file = files[0];
  isPlayable = true;
  ui.player.hidden = true;
  player.load(file);
  start();
}

function start() {
  hideProblem();
  clearTranscript();
  isWaiting = !models.length || !ui.token.hidden;
  if (isWaiting) {
    if (ui.token.hidden) {
      loadModels();
    } else {
      ui.note.textContent = `${file.name} is sent as soon as the server has taken a token.`;
      ui["token-value"].focus();
    }
    return;
  }
  if (file.size === 0) { // a folder that was dropped looks like this, too
    showProblem({ title: `${file.name} is empty.`, detail: "It holds no bytes, or is a folder. Choose a recording." });
    return;
  }
  const settings = {
    model: ui.model.value,
    language: ui.language.value,
    task: ui.task.value,
    prompt: ui.prompt.value.trim(),
    words: ui.words.checked,
  };
  showUploading();
  const began = performance.now();
  cancel = transcribe(file, settings, readToken(), {
    upload: (sent, total) => showProgress(sent, total, `${megabytes(sent)} of ${megabytes(total)}`),
    sent: () => showDecoding(settings),
    segment: (segment) => {
      showDecoding(settings); // a server may answer before it has read all
      rows.add(segment);
      ui.waiting.hidden = true;
      showDecoded();
    },
    done: (answer) => finish(answer, settings, (performance.now() - began) / 1000),
    failed: (failure) => fail(failure),
  });
}

function restart() {
  ui.note.textContent = "";
  start();
}

function showUploading() {
  setRunning(true);
  ui["job-name"].textContent = file.name;
  ui["job-size"].textContent = ` ${megabytes(file.size)}`;
  ui.phase.textContent = "Uploading";
  ui.status.textContent = `Uploading ${file.name}`;
  showProgress(0, file.size, "");
}

function showDecoding({ task }) {
  if (!ui.transcript.hidden) return;
  ui.phase.textContent = task === "translate" ? "Translating" : "Transcribing";
  ui.status.textContent = `${ui.phase.textContent} ${file.name}`;
  showProgress(null, null, "");
  ui.head.hidden = ui.files.hidden = true;
  ui.transcript.hidden = ui.waiting.hidden = false;
}

// How far the text has come, of the length where the browser knows it.
function showDecoded() {
  const [last, total] = [rows.last, player.duration];
  if (!cancel || !last) return;
  showProgress(last.end, total, total ? `${clock(last.end)} of ${clock(total)}` : clock(last.end));
}

function showProgress(value, total, amount) {
  ui.amount.textContent = amount;
  if (value === null || !total) ui.progress.removeAttribute("value"); // moving, of no known length
  else [ui.progress.max, ui.progress.value] = [total, Math.min(value, total)];
}

function finish(answer, { task, model }, seconds) {
  transcript = { ...answer, task };
  rows.set(answer.segments);
  ui.silence.hidden = answer.segments.length > 0;
  const n = answer.segments.length;
  const facts = [
    task === "translate" ? "Translated to English" : capitalised(answer.language ?? ""),
    clock(answer.duration),
    n === 1 ? "1 segment" : `${n} segments`,
    `${model} in ${seconds < 10 ? Math.max(0.1, seconds).toFixed(1) : Math.round(seconds)} s`,
  ];
  showTranscript(facts.filter(Boolean).map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · "));
  ui.status.textContent = `Done: ${facts[2]}`;
  setRunning(false, ui.heading);
}

function fail(failure) {
  if (failure.token) {
    isWaiting = true;
    stop(null);
    askToken(readToken() !== "");
    return;
  }
  showProblem({ ...failure, name: rows.last ? "" : file.name }, restart); // else the transcript has it
  stop(ui.retry);
}

// Ends without the whole text: what there is of it stays.
function stop(focus) {
  const { last } = rows;
  ui.status.textContent = "";
  if (last) {
    transcript = { segments: rows.segments };
    showTranscript(`Incomplete: the text ends at ${clock(last.end)}`);
  } else {
    ui.transcript.hidden = true;
  }
  setRunning(false, focus);
}

function cancelRequest() {
  cancel();
  stop(ui.file);
  ui.note.textContent = `${file.name} was cancelled.`;
}

function clearTranscript() {
  transcript = null;
  player.pause();
  rows.clear();
  ui.transcript.hidden = ui.silence.hidden = ui.waiting.hidden = true;
}

function showTranscript(facts) {
  ui.heading.textContent = file.name;
  ui.facts.textContent = facts;
  ui.facts.classList.toggle("bad", isIncomplete());
  ui.files.querySelector("[data-format=json]").disabled = isIncomplete(); // it is the server's whole answer
  ui.again.hidden = !ui.problem.hidden; // which has a button for it
  ui.waiting.hidden = true;
  ui.transcript.hidden = ui.head.hidden = ui.files.hidden = false;
}

// Running or not; the focus goes on where it lay on something that goes away now.
function setRunning(isRunning, focus = null) {
  const leaving = isRunning ? [ui.drop, ui.problem, ui.transcript] : [ui.job];
  const hadFocus = leaving.some((part) => part.contains(document.activeElement));
  ui.job.hidden = !isRunning;
  ui.drop.hidden = isRunning;
  ui.drop.classList.toggle("another", file !== null);
  ui["drop-title"].textContent = "Drop another recording here";
  if (!isRunning) cancel = null;
  if (hadFocus) (isRunning ? ui.cancel : focus)?.focus();
}

function showProblem({ title, detail, server = "", name = "" }, again = null) {
  ui["problem-file"].textContent = name;
  ui["problem-title"].textContent = title;
  ui["problem-detail"].textContent = detail;
  ui["problem-server"].textContent = server && `The server says: ${server}`;
  retry = again;
  ui.retry.hidden = again === null;
  ui.problem.hidden = false;
}

function hideProblem() {
  ui.problem.hidden = true;
}

function isIncomplete() {
  return transcript.text === undefined;
}

// --- taking the text along ---

function download(format) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([FORMATS[format](transcript)], { type: MEDIA_TYPES[format] }));
  link.download = `${file.name.replace(/\.[^.]*$/, "")}${isIncomplete() ? " (incomplete)" : ""}.${format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be reading it
}

async function copy() {
  try {
    await navigator.clipboard.writeText(FORMATS.txt(transcript));
    ui.note.textContent = "The text was copied.";
  } catch {
    ui.note.textContent = "This browser does not allow copying; download the text instead.";
  }
}

function capitalised(text) {
  return text.slice(0, 1).toUpperCase() + text.slice(1);
}

// --- what people do ---

ui.token.addEventListener("submit", useToken);
ui.settings.addEventListener("submit", (event) => event.preventDefault());
ui.model.addEventListener("change", offerLanguages);
ui.file.addEventListener("change", () => {
  const files = [...ui.file.files];
  ui.file.value = ""; // so that the same file can be chosen again
  if (files.length) take(files);
});
ui.cancel.addEventListener("click", cancelRequest);
ui.retry.addEventListener("click", () => retry());
ui.again.addEventListener("click", restart);
ui.copy.addEventListener("click", copy);
ui.copy.hidden = !navigator.clipboard; // which browsers give to https and to this very machine only
ui.files.addEventListener("click", ({ target }) => target.dataset.format && download(target.dataset.format));
ui.forget.addEventListener("click", () => {
  writeToken("");
  models = [];
  loadModels();
});

// A file may be dropped anywhere: beside the mark, the browser would leave the page and open it.
let depth = 0; // of the elements that it is being dragged over
const drag = (change) => {
  depth = Math.max(0, depth + change);
  ui.drop.classList.toggle("over", depth > 0);
};
addEventListener("dragenter", () => drag(1));
addEventListener("dragleave", () => drag(-1));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  drag(-depth);
  take([...event.dataTransfer.files]);
});
addEventListener("beforeunload", (event) => cancel && event.preventDefault());

loadModels();
