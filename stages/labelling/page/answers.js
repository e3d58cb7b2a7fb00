// The completions as cards: text, rank, ratings, check boxes. Every control is native and has an accessible name.

import { make } from "./server.js";

export const letter = (place) => String.fromCharCode(65 + place);

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

/** Cards for the completions. Each choice calls `changed(place, what, name, value)`. */
export function makeCards(task, questions, state, changed) {
  return task.completions.map((text, place) => {
    const name = letter(place);
    return make("article", { class: "card", tabindex: "-1", id: `card-${place}`, "aria-labelledby": `card-title-${place}` },
      make("div", { class: "card-head" },
        make("h3", { id: `card-title-${place}` }, make("span", { class: "visually-hidden" }, "Answer "), make("span", { class: "badge" }, name)),
        radios(`rank-${place}`, `Rank of answer ${name}; 1 is best`, "Rank", numbers(1, task.completions.length), state.ranks[place],
          (value) => changed(place, "ranks", null, value))),
      make("div", { class: "text", dir: "auto" }, text === "" ? make("i", { class: "hint" }, "(an empty answer)") : text),
      ...questions.ratings.map((rating) =>
        make("div", { class: "rating" },
          radios(`rating-${rating.name}-${place}`, `${rating.text}, answer ${name}${scaleWords(rating)}`, rating.text,
            numbers(rating.lowest, rating.highest), state.ratings[rating.name][place],
            (value) => changed(place, "ratings", rating.name, value)),
          rating.low || rating.high
            ? make("p", { class: "ends", "aria-hidden": "true" }, make("span", {}, rating.low), make("span", {}, rating.high)) : null)),
      questions.checks.length
        ? make("fieldset", { class: "checks" }, make("legend", { class: "visually-hidden" }, `Answer ${name}: tick what is true`),
          make("div", { class: "check-grid" }, ...questions.checks.map((check) => {
            const box = make("input", { type: "checkbox", id: `check-${check.name}-${place}`, checked: state.checks[check.name][place],
              onchange: (event) => changed(place, "checks", check.name, event.target.checked) });
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
  ranks.forEach((rank, place) => {
    for (const input of document.getElementsByName(`rank-${place}`)) input.checked = Number(input.value) === rank;
    const card = document.getElementById(`card-${place}`);
    card.classList.toggle("ranked", rank !== null);
    card.classList.toggle("selected", place === selected);
  });
}
