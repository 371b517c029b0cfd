"use strict";
// Draws the charts, sorts tables, saves figures, marks the current section in the contents, and switches themes.
(() => {
  const themes = JSON.parse(document.getElementById("themes").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const views = new Map();
  let theme = dark.matches ? "dark" : "light";
  let drawing = 0;

  async function draw() {
    const mine = ++drawing;
    for (const figure of document.querySelectorAll("figure:has(> .specification)")) {
      // Stops if another theme was chosen in the meantime.
      if (mine !== drawing) return;
      const specification = JSON.parse(figure.querySelector(".specification").textContent);
      const choices = figure.querySelector(".choices");
      const kept = keptSignals(figure.id, specification);
      views.get(figure.id)?.finalize();
      choices.replaceChildren();
      const result = await vegaEmbed(figure.querySelector(".chart"), kept, {
        mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: themes[theme], bind: choices,
        tooltip: { theme: theme === "dark" ? "dark" : undefined },
      }).catch((error) => { figure.querySelector(".chart").textContent = error.message; });
      if (result) views.set(figure.id, result.view); // Vega cannot draw some names, such as "constructor"
    }
    document.documentElement.dataset.drawn = theme;
  }

  // Keeps the reader's choices when the theme changes.
  function keptSignals(id, specification) {
    const view = views.get(id);
    if (!view) return specification;
    const params = specification.params?.map((param) =>
      param.bind && param.value !== undefined && param.bind.input ? { ...param, value: view.signal(param.name) } : param);
    return { ...specification, ...(params && { params }) };
  }

  function show(next) {
    theme = next;
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(theme === "dark"));
    draw();
  }

  function sort(header) {
    const table = header.closest("table");
    const column = header.cellIndex;
    // The first column names the row. Others start with a number ("1,234", "−0.5", "45.3 ± 1.2"), or "–" if unknown.
    const rows = [...table.tBodies[0].rows].map((row) => {
      const text = row.cells[column].textContent;
      return { row, text, number: column === 0 ? NaN : Number.parseFloat(text.replace("−", "-").replaceAll(",", "")) };
    });
    const numeric = rows.some(({ number }) => !Number.isNaN(number));
    // The first click sorts numbers in descending and text in ascending order. The next click reverses the order.
    const order = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
    const next = order[Number(header.getAttribute("aria-sort") === order[0])];
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      if (!numeric) return sign * a.text.localeCompare(b.text, undefined, { numeric: true });
      // Unknown values stay at the bottom in both orders.
      if (Number.isNaN(a.number) || Number.isNaN(b.number)) return Number.isNaN(a.number) - Number.isNaN(b.number);
      return sign * (a.number - b.number);
    });
    table.tBodies[0].append(...rows.map(({ row }) => row));
  }

  async function save(id) {
    const svg = await views.get(id)?.toSVG();
    if (!svg) return;
    const address = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
    const link = Object.assign(document.createElement("a"), { href: address, download: `${id}.svg` });
    link.click();
    URL.revokeObjectURL(address);
  }

  for (const header of document.querySelectorAll("table.sortable th[aria-sort]")) {
    header.querySelector("button").addEventListener("click", () => sort(header));
  }
  for (const saver of document.querySelectorAll("button.save")) {
    saver.addEventListener("click", () => save(saver.dataset.figure));
  }
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const part of document.querySelectorAll("section.part")) seen.observe(part);

  button.addEventListener("click", () => show(theme === "dark" ? "light" : "dark"));
  dark.addEventListener("change", () => show(dark.matches ? "dark" : "light"));
  show(theme);
})();
