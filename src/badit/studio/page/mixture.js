// The heat map of a prompt's gates, experts × layers, and the tasks whose mixtures are nearest.
// It is a table: its cells can be read out, and the arrow keys go from one to the next.

const SMALLEST = 0.01; // the deviation from 1 that has the strongest colour, at least

export class HeatMap {
  constructor(run, isDark) {
    this.run = run;
    this.isDark = isDark;
    this.figure = document.getElementById("heat-map");
    this.table = this.figure.querySelector("table");
    this.select = document.getElementById("module");
    this.readout = document.getElementById("readout");
    const modules = [...new Set(run.modules.map(([, module]) => module))];
    document.getElementById("modules").hidden = modules.length < 2;
    if (modules.length > 1) this.select.append(new Option("mean over modules", ""));
    for (const module of modules) this.select.append(new Option(module, module));
    this.select.addEventListener("change", () => this.draw());
    this.table.addEventListener("keydown", (event) => this.move(event));
    for (const kind of ["pointerover", "focusin"]) {
      this.table.addEventListener(kind, ({ target }) => this.tell(target.closest("td")));
    }
  }

  show(gates) {
    this.gates = gates;
    this.figure.hidden = false;
    this.draw();
  }

  // By layer the gates of the chosen module, or the mean over a layer's modules.
  layers() {
    const layers = new Map();
    this.run.modules.forEach(([layer, module], index) => {
      if (this.select.value && module !== this.select.value) return;
      layers.set(layer, [...(layers.get(layer) ?? []), this.gates[index]]);
    });
    return [...layers].map(([layer, rows]) => ({
      name: layer < 0 ? "–" : String(layer),
      gates: rows[0].map((_, expert) => rows.reduce((sum, row) => sum + row[expert], 0) / rows.length),
    }));
  }

  draw() {
    if (!this.gates) return;
    const layers = this.layers();
    const furthest = Math.max(...layers.flatMap(({ gates }) => gates.map((gate) => Math.abs(gate - 1))));
    const limit = Math.min(1, Math.max(SMALLEST, furthest));
    const colours = this.run.colours[this.isDark() ? "dark" : "light"];
    const rows = layers[0].gates.map((_, expert) => {
      const row = document.createElement("tr");
      row.append(heading(`Expert ${expert}`, "row"));
      for (const { name, gates } of layers) {
        const cell = document.createElement("td");
        const value = document.createElement("span");
        value.textContent = gates[expert].toFixed(3);
        cell.append(value);
        cell.dataset.said = `Expert ${expert}, layer ${name}: gate ${gates[expert].toFixed(3)}`;
        cell.tabIndex = -1;
        cell.style.backgroundColor = mixed(colours, (gates[expert] - 1) / limit);
        row.append(cell);
      }
      return row;
    });
    rows[0].cells[1].tabIndex = 0;
    const head = document.createElement("tr");
    // Few enough labels that the narrowest cells have room for them.
    const step = layers.length > 16 ? 5 : 1;
    head.append(heading("", "col"), ...layers.map(({ name }, i) => heading(i % step ? "" : name, "col", `layer ${name}`)));
    this.table.replaceChildren(section("thead", [head]), section("tbody", rows));
    this.figure.querySelector(".bar").style.background = `linear-gradient(to right, ${colours.join(", ")})`;
    document.getElementById("low").textContent = `${(1 - limit).toFixed(2)}${furthest > limit ? " or less" : ""}`;
    document.getElementById("high").textContent = `${(1 + limit).toFixed(2)}${furthest > limit ? " or more" : ""}`;
    this.readout.textContent = "Columns are layers. Point at a cell, or go there by the arrow keys, for its value.";
  }

  tell(cell) {
    if (cell) this.readout.textContent = cell.dataset.said;
  }

  move(event) {
    const cell = event.target.closest("td");
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (!cell || down === undefined) return;
    event.preventDefault();
    const next = cell.closest("tbody").rows[cell.parentElement.sectionRowIndex + down]?.cells[cell.cellIndex + right];
    if (next?.tagName !== "TD") return;
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

export function showNearest({ nearest, unmeasured }) {
  document.getElementById("nearest").hidden = !nearest.length && !unmeasured;
  document.getElementById("unmeasured").hidden = !unmeasured;
  document.querySelector("#nearest ol").replaceChildren(...nearest.map(({ task, difference }) => {
    const item = document.createElement("li");
    for (const text of [task, difference.toFixed(4)]) {
      item.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    return item;
  }));
}

function heading(text, scope, label) {
  const cell = Object.assign(document.createElement("th"), { textContent: text, scope });
  if (label) cell.setAttribute("aria-label", label);
  return cell;
}

function section(name, rows) {
  const element = document.createElement(name);
  element.append(...rows);
  return element;
}

// The colour at −1 … 1 on a scale of stops, such as #8f3b00.
function mixed(stops, value) {
  const place = ((Math.max(-1, Math.min(1, value)) + 1) / 2) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const share = place - below;
  const [from, to] = [stops[below], stops[below + 1]].map((stop) =>
    [1, 3, 5].map((start) => Number.parseInt(stop.slice(start, start + 2), 16)));
  return `rgb(${from.map((part, i) => Math.round(part + (to[i] - part) * share)).join(" ")})`;
}
