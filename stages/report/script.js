"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  if (theme) theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const PRINTED = 12;
  const SHOWN = 24;  // prompts shown at a time
  const LONGEST = 2000;  // characters of a text that are shown at once; a click shows the rest

  // Make an element with a class and children; strings become text, never markup.
  function make(tag, name, ...children) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...children);
    return element;
  }

  // A text as nodes. A long text ends with a button that shows the rest.
  function folded(text) {
    if (text.length <= LONGEST) return [text];
    const end = LONGEST - (/[\ud800-\udbff]/.test(text[LONGEST - 1]) ? 1 : 0);  // not inside a surrogate pair
    const more = make("button", "more", `… show ${(text.length - end).toLocaleString("en-US")} more characters`);
    more.type = "button";
    more.addEventListener("click", () => more.replaceWith(text.slice(end)));
    return [text.slice(0, end), more];
  }

  for (const reader of document.querySelectorAll(".reader")) {
    const part = role => reader.querySelector(`[data-role="${role}"]`);
    const {head: {names, judges, colors}, rows} = JSON.parse(part("data").textContent);
    const list = part("examples");
    const value = (role, otherwise) => part(role) ? part(role).value : otherwise;
    const count = number => number.toLocaleString("en-US");
    let fitting = [], start = 0;  // the rows that match the filters, and the index of the first row shown
    const coloured = new Map();  // text element -> its nodes without colours

    // By how much candidate a beats b on a row: a difference of scores, or -1 to 1 if the judge compares; null without a verdict.
    function ahead(row, judge, a, b) {
      if (a === b) return 0;
      const scores = row.s[judge];
      if (scores[a] !== null && scores[b] !== null) return scores[a] - scores[b];
      for (const [by, first, second, preference] of row.f || []) {
        if (by !== judge || preference === null) continue;
        if (first === a && second === b) return 2 * preference - 1;
        if (first === b && second === a) return 1 - 2 * preference;
      }
      return null;
    }

    function scoresOf(row, candidate) {
      return judges.flatMap((judge, number) => row.s[number][candidate] === null ? [] : [`${judge} ${row.s[number][candidate].toFixed(3)}`]);
    }

    // The text that the search reads; computed once per row.
    function words(row) {
      row.words ??= [row.n, row.p, ...row.c, ...names.flatMap((_, candidate) => scoresOf(row, candidate))].join("\n").toLowerCase();
      return row.words;
    }

    const compared = () => [Number(value("judge", 0)), Number(value("a", names.length - 1)), Number(value("b", 0))];

    // Select the rows that match the filters, sort them, and show the first ones.
    function choose() {
      const wanted = value("search", "").trim().toLowerCase().split(/\s+/).filter(Boolean);
      const [judge, a, b] = compared(), winner = value("winner", "any"), order = value("order", "given");
      const all = rows.map(row => ({row, margin: ahead(row, judge, a, b)}));
      const largest = all.reduce((most, {margin}) => Math.max(most, Math.abs(margin ?? 0)), 1e-9);
      const least = Number(value("margin", 0)) / 100 * largest;
      if (part("least")) part("least").textContent = Number(least.toPrecision(2));
      fitting = all.filter(({row, margin}) => {
        const side = margin === null ? "none" : margin > 0 ? "a" : margin < 0 ? "b" : "tie";
        return (winner === "any" || winner === side) && (least === 0 || (margin !== null && Math.abs(margin) >= least)) && wanted.every(word => words(row).includes(word));
      });
      if (order !== "given") fitting.sort((x, y) => order === "down" ? (y.margin ?? -Infinity) - (x.margin ?? -Infinity) : (x.margin ?? Infinity) - (y.margin ?? Infinity));
      part("count").textContent = `${count(fitting.length)} of ${count(rows.length)} ${rows.length === 1 ? "prompt" : "prompts"}`;
      part("empty").hidden = fitting.length > 0;
      start = 0;
      show();
    }

    function show() {
      list.replaceChildren(...fitting.slice(start, start + SHOWN).map(({row, margin}, index) => article(row, margin, index >= PRINTED)));
      part("pages").hidden = fitting.length <= SHOWN;
      part("range").textContent = `${count(start + 1)} to ${count(Math.min(start + SHOWN, fitting.length))} of ${count(fitting.length)}`;
      part("earlier").disabled = start === 0;
      part("later").disabled = start + SHOWN >= fitting.length;
      colour();
    }

    function article(row, margin, extra) {
      const [, a, b] = compared(), onlyTwo = part("others") !== null && !part("others").checked;
      const side = make("div", "side");
      names.forEach((name, candidate) => {
        const wins = margin !== null && ((candidate === a && margin > 0) || (candidate === b && margin < 0));
        const section = make("section", [candidate === a ? "first" : "", candidate === b ? "second" : "", wins ? "wins" : ""].filter(Boolean).join(" "));
        const dot = make("i", "dot");
        dot.style.setProperty("--c", `var(--s${colors[candidate]})`);
        section.dataset.c = candidate;
        section.hidden = onlyTwo && candidate !== a && candidate !== b;
        section.append(make("h4", "", dot, name), textOf(row, candidate), make("p", "scores", ...scoresOf(row, candidate).flatMap(score => [make("span", "", score), " "])));
        side.append(section);
      });
      const element = make("article", extra ? "extra" : "", make("h3", "", make("span", "count", row.n), ...folded(row.p), ...missing(row, -1)), side);
      element.row = row;
      return element;
    }

    function textOf(row, candidate) {
      const text = row.c[candidate];
      if (text === null) return make("p", "text none", "no completion");
      const paragraph = make("p", "text", ...folded(text), ...(text ? [] : [make("span", "cut", "(empty)")]), ...missing(row, candidate));
      if ((row.o || []).includes(candidate)) {
        const going = make("span", "cut", " …");
        going.title = "Cut off at max_new_tokens";
        paragraph.append(going);
      }
      return paragraph;
    }

    function missing(row, candidate) {
      const number = (row.m || {})[candidate];
      return number ? [make("span", "cut", ` … (${count(number)} more characters)`)] : [];
    }

    // Tokens as spans with a background.
    function colour() {
      const by = value("colour", ""), key = part("key");
      if (key) key.hidden = !by;
      if (!by) { for (const [text, plain] of coloured) text.replaceChildren(...plain); coloured.clear(); return; }
      const all = rows.flatMap(row => Object.values(row.t || {}).flatMap(detail => detail[by] || [])).filter(number => number !== null);
      const low = all.reduce((x, y) => Math.min(x, y), Infinity), high = all.reduce((x, y) => Math.max(x, y), -Infinity);
      for (const [text, plain] of coloured) text.replaceChildren(...plain);
      coloured.clear();
      for (const element of list.children) {
        for (const section of element.querySelectorAll("section")) {
          const text = section.querySelector(".text"), detail = (element.row.t || {})[section.dataset.c];
          if (!detail || !detail[by]) continue;
          coloured.set(text, [...text.childNodes]);
          text.replaceChildren(...detail.tokens.map((token, index) => tokenOf(token, detail[by][index], index, by, low, high)));
        }
      }
      const kept = rows.reduce((sum, row) => sum + Object.values(row.t || {}).filter(detail => detail[by]).length, 0);
      key.textContent = by === "kl"
        ? `Red: more likely than under the reference; blue: less likely; full colour at 3 nats. Token details exist for ${count(kept)} completions.`
        : `A stronger colour is a higher value before the token (${low.toPrecision(3)} to ${high.toPrecision(3)}). Token details exist for ${count(kept)} completions.`;
    }
    function tokenOf(token, number, index, by, low, high) {
      const span = make("span", "token", index === 0 ? token.trimStart() : token);
      const share = by === "kl" ? Math.min(1, Math.abs(number) / 3) : (number - low) / Math.max(1e-9, high - low);
      span.style.setProperty("--t", by === "kl" && number < 0 ? "55 103 181" : "194 81 47");
      span.style.setProperty("--a", (0.75 * share).toFixed(3));
      span.title = `${by === "kl" ? "log-probability minus that of the reference" : "value"}: ${number}`;
      return span;
    }

    function turn(steps) {
      start = Math.max(0, start + steps * SHOWN);
      show();
      reader.scrollIntoView();
    }

    reader.querySelector("form").addEventListener("submit", event => event.preventDefault());
    // A select element sends "change"; every other control sends "input".
    const changed = ({type, target}) => (type === "change") === (target.tagName === "SELECT") && (target.dataset.role === "colour" ? colour() : choose());
    for (const kind of ["input", "change"]) reader.querySelector("form").addEventListener(kind, changed);
    part("earlier").addEventListener("click", () => turn(-1));
    part("later").addEventListener("click", () => turn(1));
    choose();
  }

  // "/" focuses the search; Escape leaves it.
  document.addEventListener("keydown", event => {
    const search = document.querySelector('[data-role="search"]');
    const typing = /^(input|select|textarea)$/i.test(event.target.tagName);
    if (event.key === "/" && !typing && search) { event.preventDefault(); search.focus(); search.scrollIntoView({block: "center"}); }
    if (event.key === "Escape" && event.target === search) search.blur();
  });
})();
