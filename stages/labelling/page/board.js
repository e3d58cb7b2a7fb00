// The ranking as a board: a row per rank, a chip per answer. Chips are dragged (mouse, pen or finger), or moved with keys.

import { letter } from "./answers.js";
import { make } from "./server.js";

/** Draw the board. A moved chip calls `rankChip(chip, rank)` with its new rank; null removes the rank. */
export function drawBoard(board, texts, ranks, { rankChip, key }) {
  const focused = document.activeElement?.dataset?.chip;
  board.classList.toggle("many", texts.length > 5);
  const chip = (index) =>
    make("button", { type: "button", class: "chip", "data-chip": index, "aria-label":
        `Answer ${letter(index)}: ${ranks[index] === null ? "not ranked" : `rank ${ranks[index]}`}. Arrow keys or a number move it.`,
      onkeydown: (event) => key(event, index), onpointerdown: (event) => drag(event, board, (rank) => rankChip(index, rank)) },
      make("span", { class: "badge" }, letter(index)), make("span", { class: "chip-text" }, texts[index].replace(/\s+/g, " ").slice(0, 60)));
  const row = (rank, name) =>
    make("div", { class: "row", "data-rank": rank ?? "", role: "group", "aria-label": rank === null ? "Not ranked yet" : `Rank ${rank}` },
      make("span", { class: "row-name", "aria-hidden": "true" }, name),
      make("div", { class: "zone" }, ...ranks.flatMap((value, index) => (value === rank ? [chip(index)] : []))));
  const rows = texts.map((_, index) => {
    const end = index === 0 ? "best" : index === texts.length - 1 ? "worst" : "";
    return row(index + 1, make("span", {}, `${index + 1}`, end ? make("small", {}, end) : ""));
  });
  board.replaceChildren(...(ranks.includes(null) ? [row(null, make("span", {}, "to rank"))] : []), ...rows);
  board.querySelector(`[data-chip="${focused}"]`)?.focus({ preventScroll: true });
}

function drag(event, board, drop) {
  if (event.button !== 0) return;
  const chip = event.currentTarget, from = { x: event.clientX, y: event.clientY };
  let ghost = null, over = null;
  const under = (x, y) => document.elementsFromPoint(x, y).map((element) => element.closest("#board .row")).find(Boolean) ?? null;
  const move = (moved) => {
    if (!ghost && Math.hypot(moved.clientX - from.x, moved.clientY - from.y) < 5) return;
    if (!ghost) {
      chip.setPointerCapture(event.pointerId);
      ghost = chip.cloneNode(true);
      ghost.classList.add("ghost");
      ghost.style.width = `${chip.offsetWidth}px`;
      document.body.append(ghost);
      chip.classList.add("dragged");
    }
    moved.preventDefault();
    ghost.style.transform = `translate(${moved.clientX - ghost.offsetWidth / 2}px, ${moved.clientY - ghost.offsetHeight / 2}px)`;
    if (moved.clientY < 60) scrollBy(0, -12);
    if (moved.clientY > innerHeight - 60) scrollBy(0, 12);
    over?.classList.remove("over");
    over = under(moved.clientX, moved.clientY);
    over?.classList.add("over");
  };
  const end = (ended) => {
    removeEventListener("pointermove", move);
    removeEventListener("pointerup", end);
    removeEventListener("pointercancel", end);
    ghost?.remove();
    chip.classList.remove("dragged");
    over?.classList.remove("over");
    if (ghost && over && ended.type === "pointerup") drop(over.dataset.rank === "" ? null : Number(over.dataset.rank));
  };
  addEventListener("pointermove", move, { passive: false });
  addEventListener("pointerup", end);
  addEventListener("pointercancel", end);
}

/** The ranking in one line: B > A = D. */
export function rankingLine(ranks) {
  const levels = [...new Set(ranks.filter((rank) => rank !== null))].sort((a, b) => a - b);
  return levels.map((level) => ranks.flatMap((rank, index) => (rank === level ? [letter(index)] : [])).join(" = ")).join("  >  ");
}
