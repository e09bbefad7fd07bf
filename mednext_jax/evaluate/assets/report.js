// Sorts and filters the tables marked "sortable". No dependencies, no network.
"use strict";

// Undefined values stay at the end in both directions.
const compareKeys = (a, b, sign) => {
  if (typeof a === "string" || typeof b === "string") {
    return sign * String(a).localeCompare(String(b), undefined, { numeric: true });
  }
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return sign * (a - b);
};

const setUp = (table) => {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const controls = table.closest("section").querySelector(".controls");
  const find = controls.querySelector("input");
  const choices = Array.from(controls.querySelectorAll("select"));
  const count = controls.querySelector("[role=status]");

  const key = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
  };

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      rows.sort((a, b) => compareKeys(key(a, column), key(b, column), sign));
      body.append(...rows);
    });
  });

  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = [row.cells[0].textContent, ...Object.values(row.dataset)].join(" ").toLowerCase();
      const keep =
        words.every((word) => text.includes(word)) &&
        choices.every((choice) => !choice.value || row.dataset[choice.dataset.field] === choice.value);
      row.hidden = !keep;
      shown += keep;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  for (const control of [find, ...choices]) control.addEventListener("input", filter);
  filter();
};

document.querySelectorAll("table.sortable").forEach(setUp);
