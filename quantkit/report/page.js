"use strict";

// Sort a table by a column: up, down, then as it was. Rows without a number stay last either way.
function sortBy(head) {
  const heads = Array.from(head.parentElement.children);
  const column = heads.indexOf(head);
  const body = head.closest("table").tBodies[0];
  const rows = Array.from(body.rows);
  rows.forEach((row, place) => {
    row.dataset.place ??= place;
  });
  const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
  heads.forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", next);
  const words = column === 0 || head.classList.contains("words");
  const key = (row) => (words ? row.cells[column].textContent : row.cells[column].dataset.order);
  const sign = next === "descending" ? -1 : 1;
  rows.sort((one, other) => {
    const apart = one.dataset.place - other.dataset.place;
    if (next === "none") return apart;
    const [a, b] = [key(one), key(other)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined) || apart;
    return sign * (words ? a.localeCompare(b, undefined, { numeric: true }) : a - b) || apart;
  });
  body.append(...rows);
}

document.querySelectorAll("thead button").forEach((button) => {
  button.addEventListener("click", () => sortBy(button.closest("th")));
});

// What is folded on a screen is open on paper.
let opened = [];
addEventListener("beforeprint", () => {
  opened = Array.from(document.querySelectorAll("details:not([open])"));
  opened.forEach((folded) => (folded.open = true));
});
addEventListener("afterprint", () => opened.forEach((folded) => (folded.open = false)));
