"use strict";
const tip = document.getElementById("tip");

function show(text, event) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const above = event.clientY - box.height - 12;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 4 ? above : event.clientY + 16}px`;
}
const hide = () => { tip.hidden = true; };

function nearest(points, x) {
  return points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
}

for (const data of document.querySelectorAll(".chart script")) {
  const svg = data.previousElementSibling;
  const cross = svg.querySelector(".cross");
  const chart = JSON.parse(data.textContent);
  svg.addEventListener("pointermove", (event) => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const found = chart.series.map((s) => [s.name, nearest(s.points, x)]);
    const at = found.reduce((a, b) => (Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a))[1];
    const here = found.filter(([, p]) => Math.abs(p[0] - at[0]) < 12);
    cross.setAttribute("x1", at[0]);
    cross.setAttribute("x2", at[0]);
    cross.style.visibility = "visible";
    show([`${chart.x} ${at[1]}`, ...here.map(([name, p]) => `${name}: ${p[2]}`)].join("\n"), event);
  });
  svg.addEventListener("pointerleave", () => { cross.style.visibility = "hidden"; hide(); });
}

for (const cell of document.querySelectorAll(".heat [title]")) {
  cell.dataset.tip = cell.title;
  cell.removeAttribute("title");
}

for (const bar of document.querySelectorAll("[data-tip]")) {
  bar.addEventListener("pointermove", (event) => show(bar.dataset.tip, event));
  bar.addEventListener("pointerleave", hide);
}

for (const passage of document.querySelectorAll(".passage")) {
  passage.addEventListener("pointermove", (event) => {
    const token = event.target.closest(".t");
    if (!token) return hide();
    const { c, d, l } = token.dataset;
    const first = c === undefined ? `${d} pass${d === "1" ? "" : "es"}, ` : `${c}\n`;
    show((first + (l === undefined ? "" : `loss ${l} nats`)).replace(/(, |\n)$/, ""), event);
  });
  passage.addEventListener("pointerleave", hide);
}

for (const button of document.querySelectorAll(".toggle button")) {
  button.addEventListener("click", () => {
    const controls = button.closest(".controls");
    for (const part of [controls, controls.nextElementSibling]) {
      part.classList.remove(...[...part.classList].filter((name) => name.startsWith("by-")));
      part.classList.add(`by-${button.dataset.by}`);
    }
    for (const other of controls.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
  });
}
