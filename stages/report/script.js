"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  if (theme) theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const PRINTED = 12;

  for (const reader of document.querySelectorAll(".reader")) {
    const part = role => reader.querySelector(`[data-role="${role}"]`);
    const {names, judges, rows} = JSON.parse(part("data").textContent);
    const list = part("examples");
    const items = [...list.children].map((element, place) => ({element, place, row: rows[place], text: element.textContent.toLowerCase(), sections: [...element.querySelectorAll("section")]}));
    const value = (role, otherwise) => part(role) ? part(role).value : otherwise;

    // How far candidate a is ahead of b on a row: in the judge's scores, or from -1 to 1 where it compares; null where it said nothing.
    function ahead(row, judge, a, b) {
      if (a === b) return 0;
      const scores = row.s[judge];
      if (scores[a] !== null && scores[b] !== null) return scores[a] - scores[b];
      for (const [by, first, second, preference] of row.p || []) {
        if (by !== judge) continue;
        if (first === a && second === b) return 2 * preference - 1;
        if (first === b && second === a) return 1 - 2 * preference;
      }
      return null;
    }

    function show() {
      const words = (value("search", "")).trim().toLowerCase().split(/\s+/).filter(Boolean);
      const judge = Number(value("judge", 0)), a = Number(value("a", names.length - 1)), b = Number(value("b", 0));
      const winner = value("winner", "any"), order = value("order", "given");
      const margins = items.map(item => ahead(item.row, judge, a, b));
      const largest = Math.max(1e-9, ...margins.map(margin => Math.abs(margin ?? 0)));
      const least = Number(value("margin", 0)) / 100 * largest;
      if (part("least")) part("least").textContent = Number(least.toPrecision(2));
      let shown = 0;
      const ordered = items.map((item, place) => ({item, margin: margins[place]}));
      if (order !== "given") ordered.sort((x, y) => order === "down" ? (y.margin ?? -Infinity) - (x.margin ?? -Infinity) : (x.margin ?? Infinity) - (y.margin ?? Infinity));
      for (const {item, margin} of ordered) {
        const side = margin === null ? "none" : margin > 0 ? "a" : margin < 0 ? "b" : "tie";
        const fits = words.every(word => item.text.includes(word)) && (winner === "any" || winner === side) && (least === 0 || (margin !== null && Math.abs(margin) >= least));
        item.element.hidden = !fits;
        if (fits) item.element.classList.toggle("extra", ++shown > PRINTED);
        for (const section of item.sections) {
          const place = Number(section.dataset.c);
          section.classList.toggle("first", place === a);
          section.classList.toggle("second", place === b);
          section.classList.toggle("wins", (place === a && side === "a") || (place === b && side === "b"));
          section.hidden = part("others") !== null && !part("others").checked && place !== a && place !== b;
        }
      }
      list.replaceChildren(...ordered.map(({item}) => item.element));
      part("count").textContent = `${shown} of ${items.length} ${items.length === 1 ? "prompt" : "prompts"}`;
      part("empty").hidden = shown > 0;
    }

    // Tokens as spans with a background; texts stay text.
    function colour() {
      const by = value("colour", "");
      const all = items.flatMap(item => Object.values(item.row.t || {}).flatMap(detail => detail[by] || []));
      const low = all.reduce((x, y) => Math.min(x, y), Infinity), high = all.reduce((x, y) => Math.max(x, y), -Infinity);
      let coloured = 0;
      for (const item of items) {
        for (const section of item.sections) {
          const text = section.querySelector(".text"), detail = (item.row.t || {})[section.dataset.c];
          if (!text || !detail) continue;
          if (text.plain === undefined) text.plain = [...text.childNodes];
          if (!by || !detail[by]) { text.replaceChildren(...text.plain); continue; }
          coloured += 1;
          text.replaceChildren(...detail.tokens.map((token, place) => {
            const span = document.createElement("span"), number = detail[by][place];
            const share = by === "kl" ? Math.min(1, Math.abs(number) / 3) : (number - low) / Math.max(1e-9, high - low);
            span.className = "token";
            span.style.setProperty("--t", by === "kl" && number < 0 ? "55 103 181" : "194 81 47");
            span.style.setProperty("--a", (0.75 * share).toFixed(3));
            span.title = `${by === "kl" ? "log-probability against the reference" : "value"}: ${number}`;
            span.textContent = place === 0 ? token.trimStart() : token;
            return span;
          }));
        }
      }
      const key = part("key");
      if (key) {
        key.hidden = !by;
        key.textContent = by === "kl"
          ? `Red: likelier than under the reference; blue: less likely; full colour at 3 nats. Of ${coloured} completions the tokens were kept.`
          : `The stronger, the higher the value before the token (${low.toPrecision(3)} to ${high.toPrecision(3)}). Of ${coloured} completions the tokens were kept.`;
      }
    }

    reader.querySelector("form").addEventListener("submit", event => event.preventDefault());
    for (const kind of ["input", "change"]) reader.querySelector("form").addEventListener(kind, event => event.target.dataset.role === "colour" ? colour() : show());
    show();
  }

  // "/" leads to the search, as in many readers; Escape leaves it.
  document.addEventListener("keydown", event => {
    const search = document.querySelector('[data-role="search"]');
    const typing = /^(input|select|textarea)$/i.test(event.target.tagName);
    if (event.key === "/" && !typing && search) { event.preventDefault(); search.focus(); search.scrollIntoView({block: "center"}); }
    if (event.key === "Escape" && event.target === search) search.blur();
  });
})();
