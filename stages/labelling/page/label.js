// The annotator's page: one task at a time, by mouse, finger, keyboard or screen reader.

import { letter, makeCards, showPrompt, showRanks } from "./answers.js";
import { drawBoard, rankingLine } from "./board.js";
import { annotator, ask, askPatiently, make, newId, recall, remember, themeButton } from "./server.js";

const IDLE_SECONDS = 120; // without a key, a click or a scroll the clock of a task stops
const byId = (id) => document.getElementById(id);
let session, task = null, state = null, selected = null, correcting = false, sending = false, active = Date.now();

// State of a task

function freshState() {
  const { ratings, checks } = session.questions, number = task.completions.length;
  const each = (items, value) => Object.fromEntries(items.map((item) => [item.name, Array(number).fill(value)]));
  return { ranks: Array(number).fill(null), ratings: each(ratings, null), checks: each(checks, false), notes: "", flagged: null, seconds: 0, id: null };
}

/** A draft that still fits the task and the questions, or null. */
function fitting(draft) {
  const fresh = freshState();
  if (!draft) return null;
  const kept = { ...fresh, ...draft, ratings: { ...fresh.ratings }, checks: { ...fresh.checks } };
  for (const kind of ["ratings", "checks"])
    for (const name of Object.keys(fresh[kind])) if (draft[kind]?.[name]?.length === task.completions.length) kept[kind][name] = draft[kind][name];
  return draft.ranks?.length === task.completions.length ? kept : null;
}

function keepDraft() {
  if (task) remember(`draft:${task.id}`, state);
}

function changed(position, what, name, value) {
  state.id = null; // not the answer that may already have been sent
  if (what === "ranks") setRank(position, value);
  else state[what][name][position] = value;
  banner(null);
  if (position !== null) select(position, false);
  keepDraft();
}

function setRank(position, rank) {
  if (rank !== null && !session.questions.ties) {
    const holder = state.ranks.indexOf(rank);
    if (holder >= 0 && holder !== position) state.ranks[holder] = state.ranks[position];
  }
  state.ranks[position] = rank;
  state.id = null;
  banner(null);
  keepDraft();
  showRanking();
  const tied = state.ranks.flatMap((other, index) => (other === rank && index !== position ? [letter(index)] : []));
  say(rank === null ? `Answer ${letter(position)} has no rank.` : `Answer ${letter(position)}: rank ${rank}${tied.length ? `, tied with ${tied.join(" and ")}` : ""}.`);
}

// Showing

function say(text) {
  byId("status").textContent = text;
}

function banner(text, kind = "warn") {
  const element = byId("banner");
  element.hidden = !text;
  element.className = `banner ${kind}`;
  element.textContent = text ?? "";
}

function waiting(problem) {
  banner(problem && `${problem} This browser keeps your answer and sends it as soon as the server is back.`);
}

function showCounts(counts) {
  const { mine, ranked, target } = counts, meter = byId("meter");
  meter.style.setProperty("--share", Math.min(1, ranked / target));
  meter.setAttribute("aria-valuemax", target);
  meter.setAttribute("aria-valuenow", Math.min(ranked, target));
  const all = ranked >= target ? `target of ${target} reached` : `${ranked} of ${target} ranked by all`;
  byId("counts").textContent = `${mine} answered by you · ${all}`;
}

function showRanking() {
  const hooks = { rankChip: (index, rank) => { setRank(index, rank); select(index, false); }, key: (event, index) => chipKey(event, index) };
  drawBoard(byId("board"), task.completions, state.ranks, hooks);
  showRanks(state.ranks, selected);
  byId("summary").textContent = rankingLine(state.ranks);
}

function showFlag() {
  byId("flag-line").hidden = state.flagged === null;
  byId("flag-line").textContent = state.flagged === null ? "" : `Flagged: ${state.flagged}`;
  byId("flag").setAttribute("aria-pressed", state.flagged !== null);
  byId("flag").textContent = state.flagged === null ? "Flag" : "Flagged";
}

function showTask() {
  const { questions } = session;
  selected = null;
  byId("message").hidden = true;
  byId("form").hidden = false;
  byId("mode").hidden = !correcting;
  showPrompt(byId("prompt"), task.prompt);
  byId("answers-title").textContent = `${task.completions.length} answers`;
  byId("answers").replaceChildren(...makeCards(task, questions, state, changed));
  byId("answers").classList.toggle("brief", task.completions.every((text) => text.length < 500));
  byId("board-hint").textContent = questions.ranking + (questions.ties ? " Answers that are equally good may share a rank." : "");
  byId("notes-field").hidden = !questions.notes;
  byId("notes").value = state.notes;
  byId("last-rank").textContent = task.completions.length;
  showRanking();
  showFlag();
  scrollTo(0, 0);
  byId("prompt-title").focus({ preventScroll: true });
}

function showMessage(title, text) {
  task = null;
  byId("form").hidden = true;
  byId("message").hidden = false;
  const again = make("button", { type: "button", class: "secondary", onclick: () => next() }, "Look again");
  byId("message").replaceChildren(make("h1", { tabindex: "-1" }, title), make("p", {}, text), again);
  byId("message").querySelector("h1").focus();
  say(title);
}

// Going from task to task

/** Reload the page if the server's questions changed. The browser keeps drafts, and shows the parts that still fit. */
function reloaded({ version }) {
  if (!version || version === session.version) return false;
  location.reload();
  return true;
}

async function next() {
  correcting = false;
  const content = await askPatiently("/api/task", { params: { wish: recall("current") ?? "" } }, waiting).catch(fatal);
  if (!content || reloaded(content)) return;
  showCounts(content.counts);
  const { screening } = content;
  if (!content.task) {
    if (screening && screening.passed === false) showMessage("Thank you.", "The trial tasks are done. The person who sent you the link will tell you the next step.");
    else if (content.counts.mine === 0) showMessage("No task is open.", "Other annotators are working on all remaining tasks. Try again later, because some may become free.");
    else showMessage("All done. Thank you!", "There is no further task for you. All your answers are stored.");
    return;
  }
  begin(content.task, draftOrFresh);
  remember("current", task.id);
  const trial = screening && screening.answered < screening.of ? ` Trial task ${screening.answered + 1} of ${screening.of}.` : "";
  if (trial) byId("counts").textContent = trial;
  say(`A new task with ${task.completions.length} answers.${trial}`);
}

const draftOrFresh = () => fitting(recall(`draft:${task.id}`)) ?? freshState();

function begin(given, stateOf) {
  task = given;
  state = stateOf();
  active = Date.now();
  counted = performance.now();
  showTask();
}

async function correct(id) {
  const content = await ask("/api/task", { params: { id } }).catch((error) => banner(error.message));
  if (!content) return;
  correcting = true;
  begin(content.task, () => fitting(recall(`draft:${id}`)) ?? asShown(content.answer));
  say("You are correcting an earlier answer.");
}

/** An answer from the server, in the order in which the completions are shown. */
function asShown(answer) {
  const pick = (values) => task.order.map((index) => values[index]);
  const picked = (kind, values) => ({ ...kind, ...Object.fromEntries(Object.entries(values).filter(([name]) => name in kind).map(([name, list]) => [name, pick(list)])) });
  const fresh = freshState();
  return {
    ...fresh, ranks: answer.ranks ? pick(answer.ranks).map((rank) => rank + 1) : fresh.ranks, ratings: picked(fresh.ratings, answer.ratings),
    checks: picked(fresh.checks, answer.checks), notes: answer.notes, flagged: answer.flagged,
  };
}

/** The answer in the order of the task's completions: the server identifies completions by their index, not by their position. */
function asSent(skipped) {
  const back = (values) => task.order.map((_, index) => values[task.order.indexOf(index)]);
  const each = (kind) => Object.fromEntries(Object.entries(kind).map(([name, values]) => [name, back(values)]));
  const choices = skipped === null ? { ranks: back(state.ranks), ratings: each(state.ratings), checks: each(state.checks) } : {};
  return { id: state.id, task: task.id, order: task.order, seconds: state.seconds, notes: state.notes, flagged: state.flagged, skipped, ...choices };
}

function missing() {
  const unranked = state.ranks.indexOf(null);
  if (unranked >= 0) return { position: unranked, text: `Answer ${letter(unranked)} has no rank yet.`, name: `rank-${unranked}` };
  for (const rating of session.questions.ratings.filter((item) => item.required)) {
    const unrated = state.ratings[rating.name].indexOf(null);
    if (unrated >= 0) return { position: unrated, text: `${rating.text}: answer ${letter(unrated)} has no rating yet.`, name: `rating-${rating.name}-${unrated}` };
  }
  return null;
}

async function submit(skipped = null) {
  if (!task || sending) return;
  const gap = skipped === null ? missing() : null;
  if (gap) {
    banner(gap.text);
    select(gap.position, false);
    byId(`card-${gap.position}`).scrollIntoView({ block: "nearest" });
    document.getElementsByName(gap.name)[0].focus();
    return;
  }
  sending = true;
  byId("submit").disabled = true;
  count();
  state.id ??= newId();
  keepDraft();
  const done = task.id;
  try {
    const content = await askPatiently("/api/answer", { body: asSent(skipped) }, waiting);
    remember(`draft:${done}`, null);
    remember("current", null);
    showCounts(content.counts);
    task = null;
    await next();
  } catch (error) {
    if (!reloaded(error.content ?? {})) banner(error.message);
  } finally {
    sending = false;
    byId("submit").disabled = false;
  }
}

function fatal(error) {
  showMessage("This page cannot be opened.", error.message);
}

// Keys

function select(position, moveFocus = true) {
  selected = position;
  showRanks(state.ranks, selected);
  if (!moveFocus) return;
  const card = byId(`card-${position}`);
  card.focus({ preventScroll: true });
  card.scrollIntoView({ block: "nearest" });
}

function shift(position, step) {
  const number = state.ranks.length, rank = state.ranks[position];
  if (rank === null) setRank(position, step > 0 ? number : 1);
  else if (rank + step >= 1 && rank + step <= number) setRank(position, rank + step);
}

/** Handle keys that act on one answer. Returns whether the key was one of them. */
function answerKey(event, position) {
  const digit = /^(Digit|Numpad)([1-9])$/.exec(event.code)?.[2];
  if (event.key === "ArrowUp") shift(position, -1);
  else if (event.key === "ArrowDown") shift(position, 1);
  else if (event.key === "Backspace" || event.key === "Delete") setRank(position, null);
  else if (digit && event.shiftKey) {
    const rating = session.questions.ratings[0];
    if (!rating || digit < rating.lowest || digit > rating.highest) return false;
    changed(position, "ratings", rating.name, Number(digit));
    for (const input of document.getElementsByName(`rating-${rating.name}-${position}`)) input.checked = input.value === digit;
    say(`Answer ${letter(position)}: ${rating.text} ${digit}.`);
  } else if (digit && Number(digit) <= state.ranks.length) {
    const wasRanked = state.ranks[position] !== null;
    setRank(position, Number(digit));
    const following = state.ranks.indexOf(null);
    if (!wasRanked && following >= 0 && !document.activeElement?.dataset?.chip && !session.questions.ratings.length) select(following);
  } else return false;
  event.preventDefault();
  return true;
}

function chipKey(event, index) {
  if (!event.ctrlKey && !event.metaKey && !event.altKey && answerKey(event, index)) {
    event.stopPropagation();
    selected = index;
    showRanks(state.ranks, selected);
  }
}

function pageKey(event) {
  if (!task || document.querySelector("dialog[open]")) return;
  const target = event.target, isText = target.matches("textarea, input[type=text], input[type=password]");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
    return;
  }
  if (isText || event.ctrlKey || event.metaKey || event.altKey || !byId("shortcuts").checked) return;
  if (event.key === "Enter" && !target.matches("button, a")) {
    event.preventDefault();
    submit();
    return;
  }
  const position = event.key.length === 1 && !event.shiftKey ? event.key.toLowerCase().charCodeAt(0) - 97 : -1;
  if (position >= 0 && position < task.completions.length) {
    event.preventDefault();
    select(position);
    say(`Answer ${letter(position)}.`);
    return;
  }
  // Arrow keys move a focused radio button. They scroll the page if no card has the focus.
  const isArrow = event.key.startsWith("Arrow");
  if (selected !== null && (!isArrow || target.matches(".card")) && answerKey(event, selected)) return;
  const action = { s: () => skip(), x: () => flag(), u: () => openHistory(), "?": () => openHelp() }[event.key.toLowerCase()];
  if (action) {
    event.preventDefault();
    action();
  }
}

// Dialogs

function askReason({ title, hint, save, suggestions, value = "", removable = false }) {
  const dialog = byId("reason"), text = byId("reason-text");
  byId("reason-title").textContent = title;
  byId("reason-hint").textContent = hint;
  byId("reason-save").textContent = save;
  byId("reason-remove").hidden = !removable;
  byId("suggestions").replaceChildren(...suggestions.map((suggestion) =>
    make("button", { type: "button", class: "suggestion", onclick: () => { text.value = suggestion; text.focus(); } }, suggestion)));
  text.value = value;
  dialog.showModal();
  text.focus();
  return new Promise((done) => {
    const listening = new AbortController(), finish = (result) => { listening.abort(); dialog.close(); done(result); };
    const on = (element, event, handler) => element.addEventListener(event, handler, { signal: listening.signal });
    on(byId("reason-form"), "submit", (event) => {
      event.preventDefault();
      if (text.value.trim()) finish(text.value.trim());
      else text.focus();
    });
    on(byId("reason-cancel"), "click", () => finish(undefined));
    on(byId("reason-remove"), "click", () => finish(null));
    on(dialog, "cancel", (event) => { event.preventDefault(); finish(undefined); });
    on(text, "keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("reason-form").requestSubmit(); });
  });
}

async function skip() {
  if (!task) return;
  const reason = await askReason({ title: "Skip this task", hint: "Another annotator gets it.", save: "Skip",
    suggestions: ["I do not know enough about this", "The instruction makes no sense", "I would rather not judge this"] });
  if (!reason) return;
  state.id = null;
  submit(reason);
}

async function flag() {
  if (!task) return;
  const reason = await askReason({ title: "Flag this task", hint: "The person who leads the labelling looks at it. Your ranking of it is not used for training.", save: "Flag",
    suggestions: ["Personal data", "Broken text", "Needs an expert"], value: state.flagged ?? "", removable: state.flagged !== null });
  if (reason === undefined) return;
  state.flagged = reason;
  state.id = null;
  keepDraft();
  showFlag();
  say(reason === null ? "The flag is removed." : "The task is flagged. Rank it or skip it to continue.");
}

async function openHistory() {
  const content = await ask("/api/answers").catch((error) => banner(error.message));
  if (!content) return;
  const list = content.answers.map((answer) =>
    make("li", {}, make("button", { type: "button", onclick: () => { byId("history").close(); correct(answer.task); } },
      make("span", { class: "history-prompt" }, answer.prompt), make("small", {}, `${new Date(answer.time).toLocaleString()} · ${answer.state}`))));
  byId("history-list").replaceChildren(...(list.length ? list : [make("li", { class: "hint" }, "There are none yet.")]));
  byId("history").showModal();
}

function openHelp() {
  byId("help").showModal();
}

// The clock of a task: seconds during which the task is visible and the annotator is active

let counted = performance.now();

function count(isInView = !document.hidden) {
  const now = performance.now(), isAtWork = task && state && isInView && Date.now() - active < 1000 * IDLE_SECONDS;
  if (isAtWork) state.seconds = Math.round(1000 * state.seconds + now - counted) / 1000;
  counted = now;
}

setInterval(() => { count(); keepDraft(); }, 2000);
document.addEventListener("visibilitychange", () => count(document.hidden)); // hidden now: in view until now
for (const event of ["keydown", "pointerdown", "pointermove", "wheel", "scroll"]) addEventListener(event, () => { active = Date.now(); }, { passive: true });

async function start() {
  themeButton(byId("theme"));
  session = await askPatiently("/api/session", {}, waiting).catch(fatal);
  if (!session) return;
  document.title = session.questions.title;
  byId("name").textContent = session.questions.title;
  byId("annotator").textContent = annotator;
  byId("rating-keys").hidden = session.questions.ratings.length === 0;
  if (session.questions.ratings.length) byId("last-rating").textContent = Math.min(9, session.questions.ratings[0].highest);
  byId("instructions").innerHTML = session.instructions; // HTML that the server rendered from the leader's file; it contains no model text
  byId("shortcuts").checked = recall("shortcuts") ?? true;
  byId("shortcuts").addEventListener("change", (event) => remember("shortcuts", event.target.checked));
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  byId("notes").addEventListener("input", (event) => { state.notes = event.target.value; state.id = null; keepDraft(); });
  byId("skip").addEventListener("click", skip);
  byId("flag").addEventListener("click", flag);
  byId("open-history").addEventListener("click", openHistory);
  byId("open-help").addEventListener("click", openHelp);
  byId("leave-correction").addEventListener("click", () => next());
  document.addEventListener("keydown", pageKey);
  byId("answers").addEventListener("focusin", (event) => {
    const card = event.target.closest(".card");
    if (card && task) { selected = Number(card.id.slice(5)); showRanks(state.ranks, selected); }
  });
  addEventListener("pagehide", keepDraft);
  await next();
  if (session.instructions && !recall("instructed")) openHelp();
  remember("instructed", true);
}

start();
