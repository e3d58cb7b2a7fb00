// The leader's page: the numbers of `stages label --report`, every few seconds.

import { ask, make, themeButton } from "./server.js";

const byId = (id) => document.getElementById(id);
const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)} %`);
const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const seconds = (value) => (value === null ? "–" : value < 90 ? `${Math.round(value)} s` : `${(value / 60).toFixed(1)} min`);
const interval = (share) => (!share || share.share === null ? "" : `95 %: ${percent(share.ci_low)} to ${percent(share.ci_high)}; ${share.pairs} pairs`);

function tile(name, value, ...notes) {
  return make("div", { class: "tile" }, make("dt", {}, name), make("dd", {}, make("span", { class: "big" }, value), ...notes.filter(Boolean).map((note) => make("small", {}, note))));
}

function table(heads, rows) {
  return make("table", { class: "table" }, make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows.map(([first, ...cells]) => make("tr", {}, make("th", { scope: "row", class: "wrap" }, first), ...cells.map((cell) =>
      Array.isArray(cell) ? make("td", {}, cell[0], make("small", {}, cell[1])) : make("td", {}, cell))))));
}

function timeLeft(content) {
  const left = content.target - content.ranked_tasks, rate = content.rate.last_hour;
  if (left <= 0) return "the target is reached";
  return rate ? `about ${Math.max(1, Math.round((60 * left) / rate))} min left at this rate` : "";
}

function screening(row) {
  if (!row.screening) return "–";
  const { passed, answered, of, ranking_agreement: agreement } = row.screening;
  return [passed === null ? `${answered} of ${of}` : passed ? "passed" : "not passed", agreement === null ? "" : `agrees ${percent(agreement)}`];
}

function show(content) {
  const { agreement, rate, paper_agreement: paper, position, reward_model: model } = content;
  byId("name").textContent = content.name;
  byId("headline").textContent = `${content.ranked_tasks} of ${content.target} tasks are ranked.`;
  byId("updated").textContent = [`as of ${new Date().toLocaleTimeString()}`, content.notice].filter(Boolean).join("; ");
  const meter = byId("meter");
  meter.style.setProperty("--share", Math.min(1, content.ranked_tasks / content.target));
  meter.setAttribute("aria-valuemax", content.target);
  meter.setAttribute("aria-valuenow", Math.min(content.ranked_tasks, content.target));
  byId("tiles").replaceChildren(
    tile("Answers in the last hour", `${rate.last_hour}`, `${content.answers} in total; ${number(rate.per_hour_of_work, 0)} per hour of work`, timeLeft(content)),
    tile("Time per task (median)", seconds(content.seconds.median), `90 % below ${seconds(content.seconds.p90)}`),
    tile("Agreement on pairs", percent(agreement.pairwise.share), interval(agreement.pairwise), `the paper's: ${percent(paper.training)}, held-out annotators ${percent(paper["held-out"])}`),
    tile("Krippendorff's alpha", number(agreement.alpha), "ordinal, on ranks", `${agreement.overlap_tasks} tasks ranked by several`),
    tile("Wins of the answer shown earlier", percent(position.earlier_wins.share), interval(position.earlier_wins), "50 % without a position bias"),
    ...(model ? [tile("Agreement with the last reward model", percent(model.share), interval(model), model.model)] : []),
  );
  byId("annotators").replaceChildren(table(
    ["annotator", "answers", "skipped", "flagged", "corrected", "median", "ties", "with the others", ...(model ? ["with the reward model"] : []), "screening"],
    content.annotators.map((row) => [row.name, `${row.answers}`, `${row.skipped}`, `${row.flagged}`, `${row.corrected}`, seconds(row.median_seconds), percent(row.ties),
      [percent(row.against_the_rest.share), interval(row.against_the_rest)], ...(model ? [[percent(row.against_reward_model.share), interval(row.against_reward_model)]] : []), screening(row)])));
  const questions = [
    ...Object.values(content.ratings).map((row) => [row.text, `mean ${number(row.mean)}`, `${row.n}`, `alpha ${number(row.alpha)}`]),
    ...Object.values(content.checks).map((row) => [row.text, percent(row.share), `${row.n}`, `kappa ${number(row.kappa)} (${row.compared})`]),
  ];
  byId("questions-section").hidden = questions.length === 0;
  byId("questions").replaceChildren(table(["question", "answer", "completions", "agreement (compared)"], questions));
  byId("position-hint").textContent = "How often the answer at each position was the best one. The line shows chance.";
  byId("position").replaceChildren(...position.best.map((row) => {
    const fill = make("div", { class: "fill" }), line = make("div", { class: "chance" });
    fill.style.setProperty("--share", row.best);
    line.style.setProperty("--chance", row.chance);
    return make("div", {}, make("span", {}, `position ${row.position}`), make("div", { class: "track" }, fill, line), make("span", {}, `${percent(row.best)} of ${row.n}`));
  }));
  const reasons = [...Object.entries(content.skipped.reasons).map(([reason, count]) => [reason, "skipped", `${count}`]), ...Object.entries(content.flagged.reasons).map(([reason, count]) => [reason, "flagged", `${count}`])];
  byId("reasons-section").hidden = reasons.length === 0;
  byId("reasons").replaceChildren(table(["reason", "what", "answers"], reasons));
}

async function refresh() {
  try {
    show(await ask("/api/progress"));
    byId("banner").hidden = true;
  } catch (error) {
    byId("banner").hidden = false;
    byId("banner").textContent = error instanceof TypeError ? "The server cannot be reached; these numbers are out of date." : error.message;
  }
}

themeButton(byId("theme"));
byId("invite").addEventListener("submit", async (event) => {
  event.preventDefault();
  const made = await ask("/api/invite", { body: { annotator: byId("invite-name").value.trim() } }).catch((error) => ({ link: error.message }));
  byId("invite-link").textContent = made.link;
});
refresh().then(() => setInterval(() => { if (!document.hidden) refresh(); }, 5000));
