"use strict";
document.documentElement.classList.add("js");
for (const image of document.querySelectorAll("img[data-same]")) {
  image.src = document.getElementById(image.dataset.same).src;
}
for (const box of document.querySelectorAll(".compare")) {
  const [left, right] = box.querySelectorAll("select");
  const [views, range] = [box.querySelector(".views"), box.querySelector("input")];
  const show = () => {
    views.querySelectorAll("figure").forEach((figure, index) => {
      figure.className = index == right.value ? "right" : index == left.value ? "left" : "";
    });
    views.style.setProperty("--at", range.value + "%");
  };
  for (const control of [left, right, range]) control.addEventListener("input", show);
  show();
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const cell = row => row.cells[head.cellIndex].textContent;
    const number = text =>
      text === "inf" ? Infinity : text === "nan" ? -Infinity : text.trim() === "" ? NaN : Number(text);
    const compare = (one, two) => {
      const [x, y] = [number(one), number(two)];
      if (isNaN(x) || isNaN(y)) return one.localeCompare(two, undefined, {numeric: true});
      return x < y ? -1 : x > y ? 1 : 0;
    };
    const rows = [...body.rows].sort((one, two) => compare(cell(one), cell(two)));
    body.append(...(order === "ascending" ? rows : rows.reverse()));
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
  });
}
