"use strict";
// Charts: the value under the pointer. Without this script every chart shows its last value.
for (const hit of document.querySelectorAll(".hit")) {
  const svg = hit.ownerSVGElement, figure = svg.closest("figure");
  const output = figure.querySelector("output");
  const [line, dot] = svg.querySelectorAll(".cursor");
  const series = JSON.parse(hit.dataset.series);
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let best = series[0];
    for (const point of series) if (Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
    line.setAttribute("x1", best[0]); line.setAttribute("x2", best[0]);
    dot.setAttribute("cx", best[0]); dot.setAttribute("cy", best[1]);
    output.textContent = "step " + Math.round(best[2]) + ": " + best[3];
    svg.classList.add("on");
  };
  hit.addEventListener("pointermove", show);
  hit.addEventListener("pointerdown", show);
  hit.addEventListener("pointerleave", () => {
    svg.classList.remove("on");
    output.textContent = output.dataset.last;
  });
}
// Samples: search, order, and a page at a time. Without this script all of them are shown.
const list = document.querySelector("#cards");
if (list) {
  const cards = [...list.children], find = document.querySelector("#find");
  const order = document.querySelector("#order"), more = document.querySelector("#more");
  const count = document.querySelector("#count"), page = 20;
  const words = cards.map((card) => card.textContent.toLocaleLowerCase());
  let limit = page;
  const draw = () => {
    const [key, sign] = order.value.split(":");
    const query = find.value.trim().toLocaleLowerCase();
    const found = cards.map((card, i) => i).filter((i) => words[i].includes(query));
    const rank = (i) => (key ? Number(cards[i].dataset[key] ?? NaN) * Number(sign) : i);
    const value = (i) => (Number.isNaN(rank(i)) ? Infinity : rank(i));
    found.sort((a, b) => value(a) - value(b) || a - b);
    list.replaceChildren(...found.slice(0, limit).map((i) => cards[i]));
    count.textContent = Math.min(limit, found.length) + " of " + found.length;
    more.hidden = limit >= found.length;
  };
  document.querySelector("#tools").hidden = false;
  find.addEventListener("input", () => { limit = page; draw(); });
  order.addEventListener("change", () => { limit = page; draw(); });
  more.addEventListener("click", () => { limit += page; draw(); });
  draw();
}
