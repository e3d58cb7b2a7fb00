// The completions as cards: text, rank, ratings, check boxes. Every control is native and has an accessible name.

import { make } from "./server.js";

export const letter = (position) => String.fromCharCode(65 + position);

/** The prompt: a text, or the turns of a conversation. */
export function showPrompt(element, prompt) {
  const turns = typeof prompt === "string" ? [{ role: null, content: prompt }] : prompt;
  const names = { system: "System", developer: "Developer", user: "User", assistant: "Assistant", tool: "Tool", function: "Tool", tools: "Tools" };
  element.replaceChildren(
    ...turns.map(({ role, content }) =>
      make("div", { class: role ? `turn ${role in names ? role : "other"}` : "turn" }, role ? make("p", { class: "role" }, names[role] ?? role) : null,
        make("div", { class: "text", dir: "auto" }, content))),
  );
}

/** Cards for the completions. Each choice calls `changed(position, what, name, value)`. */
export function makeCards(task, questions, state, changed) {
  return task.completions.map((text, position) => {
    const name = letter(position);
    return make("article", { class: "card", tabindex: "-1", id: `card-${position}`, "aria-labelledby": `card-title-${position}` },
      make("div", { class: "card-head" },
        make("h3", { id: `card-title-${position}` }, make("span", { class: "visually-hidden" }, "Answer "), make("span", { class: "badge" }, name)),
        radios(`rank-${position}`, `Rank of answer ${name}; 1 is best`, "Rank", numbers(1, task.completions.length), state.ranks[position],
          (value) => changed(position, "ranks", null, value))),
      make("div", { class: "text", dir: "auto" }, text === "" ? make("i", { class: "hint" }, "(an empty answer)") : text),
      ...questions.ratings.map((rating) =>
        make("div", { class: "rating" },
          radios(`rating-${rating.name}-${position}`, `${rating.text}, answer ${name}${scaleWords(rating)}`, rating.text,
            numbers(rating.lowest, rating.highest), state.ratings[rating.name][position],
            (value) => changed(position, "ratings", rating.name, value)),
          rating.low || rating.high
            ? make("p", { class: "ends", "aria-hidden": "true" }, make("span", {}, rating.low), make("span", {}, rating.high)) : null)),
      questions.checks.length
        ? make("fieldset", { class: "checks" }, make("legend", { class: "visually-hidden" }, `Answer ${name}: tick what is true`),
          make("div", { class: "check-grid" }, ...questions.checks.map((check) => {
            const box = make("input", { type: "checkbox", id: `check-${check.name}-${position}`, checked: state.checks[check.name][position],
              onchange: (event) => changed(position, "checks", check.name, event.target.checked) });
            return make("label", { class: "check" }, box, make("span", {}, check.text));
          })))
        : null);
  });
}

function scaleWords(rating) {
  return (rating.low ? `; ${rating.lowest}: ${rating.low}` : "") + (rating.high ? `; ${rating.highest}: ${rating.high}` : "");
}

const numbers = (from, to) => Array.from({ length: to - from + 1 }, (_, index) => from + index);

function radios(name, legend, shown, values, chosen, choose) {
  return make("fieldset", { class: "radios" }, make("legend", { class: "visually-hidden" }, legend),
    make("span", { class: "radios-name", "aria-hidden": "true" }, shown),
    make("div", { class: "segments" },
      ...values.map((value) => make("label", {},
        make("input", { type: "radio", name, value, checked: value === chosen, onchange: () => choose(value) }), make("span", {}, `${value}`)))));
}

/** Set the rank buttons of the cards to the given ranks. */
export function showRanks(ranks, selected) {
  ranks.forEach((rank, position) => {
    for (const input of document.getElementsByName(`rank-${position}`)) input.checked = Number(input.value) === rank;
    const card = document.getElementById(`card-${position}`);
    card.classList.toggle("ranked", rank !== null);
    card.classList.toggle("selected", position === selected);
  });
}
