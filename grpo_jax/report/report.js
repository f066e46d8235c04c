"use strict";
// Without this script the page shows everything: last values, first choices, all samples.
for (const tools of document.querySelectorAll("[data-tools]")) tools.hidden = false;

// Charts: the value under the pointer.
for (const hit of document.querySelectorAll(".hit")) {
  const svg = hit.ownerSVGElement, figure = svg.closest("figure");
  const output = figure.querySelector("output");
  const [line, dot] = svg.querySelectorAll(".cursor");
  let points = null; // [x, y, text], made when the pointer first comes
  const read = () => {
    const places = [...svg.querySelectorAll("polyline.data")].map((drawn) => drawn.points);
    return JSON.parse(hit.dataset.series).flatMap(([name, values], i) => values.map(
      ([step, value], j) => [places[i][j].x, places[i][j].y,
        (name ? name + ", " : "") + "step " + Math.round(step) + ": " + value]));
  };
  const show = (event) => {
    points ??= read();
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    // Nearest across; among the lines of several arms, the nearest one there.
    const away = (point) => Math.abs(point[0] - x) + 0.001 * Math.abs(point[1] - y);
    let best = points[0];
    for (const point of points) if (away(point) < away(best)) best = point;
    line.setAttribute("x1", best[0]); line.setAttribute("x2", best[0]);
    dot.setAttribute("cx", best[0]); dot.setAttribute("cy", best[1]);
    output.textContent = best[2];
    svg.classList.add("on");
  };
  hit.addEventListener("pointermove", show);
  hit.addEventListener("pointerdown", show);
  hit.addEventListener("pointerleave", () => {
    svg.classList.remove("on");
    output.textContent = output.dataset.last;
  });
}

// Legends: the arm under the pointer stands out in the charts below.
for (const block of document.querySelectorAll("[data-curves]")) {
  const lines = [...block.querySelectorAll("g[data-arm]")];
  for (const entry of block.querySelectorAll(".legend li")) {
    const show = (on) => () => {
      for (const line of lines) line.classList.toggle("dim", on && line.dataset.arm !== entry.dataset.arm);
    };
    for (const name of ["pointerenter", "focus"]) entry.addEventListener(name, show(true));
    for (const name of ["pointerleave", "blur"]) entry.addEventListener(name, show(false));
  }
}

// Panels: lists choose which one is shown.
for (const box of document.querySelectorAll("[data-panels]")) {
  const lists = [...document.querySelectorAll("select[data-for]")]
    .filter((list) => list.dataset.for === box.dataset.panels);
  const draw = () => {
    const key = lists.map((list) => list.value).join("|");
    const all = [...box.children].filter((panel) => "key" in panel.dataset);
    for (const panel of all) panel.hidden = panel.dataset.key !== key;
    box.querySelector(":scope > [data-otherwise]").hidden = all.some((panel) => !panel.hidden);
  };
  for (const list of lists) list.addEventListener("change", draw);
  if (lists.length) draw();
}

// Tables: a click on a heading sorts by it, best first to worst, then the other way, then as given.
for (const table of document.querySelectorAll("table[data-sort]")) {
  const body = table.tBodies[0], given = [...body.rows];
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const states = column ? ["descending", "ascending", null] : ["ascending", "descending", null];
      const state = states[(states.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      for (const other of heads) other.removeAttribute("aria-sort");
      const rows = [...given];
      if (state) {
        head.setAttribute("aria-sort", state);
        const sign = state === "ascending" ? 1 : -1;
        const value = (row) => row.cells[column].dataset.value;
        rows.sort((a, b) => {
          if (!column) return sign * a.cells[0].textContent.localeCompare(b.cells[0].textContent);
          if (value(a) === undefined || value(b) === undefined)
            return (value(a) === undefined) - (value(b) === undefined); // gaps come last
          return sign * (Number(value(a)) - Number(value(b)));
        });
      }
      body.append(...rows);
    });
  });
}

// Samples: search, test set, order, arms, and a page at a time.
const list = document.querySelector("#cards");
if (list) {
  const at = (id) => document.querySelector("#" + id);
  const cards = [...list.children], find = at("find"), order = at("order"), more = at("more");
  const group = at("group"), arm = at("arm"), against = at("against"), page = 20;
  const picks = [...at("picks").querySelectorAll("input")];
  const words = cards.map((card) => card.textContent.toLocaleLowerCase());
  const scores = cards.map((card) => JSON.parse(card.dataset.scores));
  let limit = page;
  // Arms that were measured on another test set are not offered.
  const offer = () => {
    if (!group) return;
    for (const offered of document.querySelectorAll("#picks [data-group], #samples option[data-group]"))
      offered.hidden = offered.dataset.group !== group.value;
    for (const select of [arm, against])
      if (select.selectedOptions[0]?.hidden)
        select.value = [...select.options].find((option) => !option.hidden)?.value ?? "";
  };
  const draw = () => {
    offer();
    const [key, sign] = order.value.split(":");
    const query = find.value.trim().toLocaleLowerCase();
    const wanted = new Set(picks.filter((pick) => pick.checked).map((pick) => pick.value));
    at("of").hidden = !key;
    at("over").hidden = key !== "gain";
    const rank = (i) => {
      const own = scores[i][arm.value] ?? NaN, other = scores[i][against.value] ?? NaN;
      const value = Number(sign) * (key === "gain" ? own - other : own);
      return !key ? i : Number.isNaN(value) ? Infinity : value;
    };
    const found = cards.map((card, i) => i)
      .filter((i) => words[i].includes(query) && (!group || cards[i].dataset.group === group.value))
      .map((i) => [rank(i), i]);
    found.sort((a, b) => (a[0] === b[0] ? a[1] - b[1] : a[0] < b[0] ? -1 : 1));
    const shown = found.slice(0, limit).map(([, i]) => cards[i]);
    for (const card of shown)
      for (const answer of card.querySelectorAll("[data-arm]"))
        answer.hidden = !wanted.has(answer.dataset.arm);
    list.replaceChildren(...shown);
    at("count").textContent = shown.length + " of " + found.length;
    more.hidden = limit >= found.length;
  };
  const again = () => { limit = page; draw(); };
  find.addEventListener("input", again);
  for (const control of [order, group, arm, against, ...picks])
    if (control) control.addEventListener("change", again);
  for (const button of at("picks").querySelectorAll("[data-pick]"))
    button.addEventListener("click", () => {
      for (const pick of picks) pick.checked = button.dataset.pick === "all";
      draw();
    });
  more.addEventListener("click", () => { limit += page; draw(); });
  draw();
}
