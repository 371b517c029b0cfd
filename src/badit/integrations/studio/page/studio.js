// The page sends a prompt to the server, receives the answers token by token and shows the gates that were used.
// All text from data and models is set as textContent, never as markup.

const SIDES = ["hand", "router", "base"];
const NEUTRAL = 1; // the neutral gate
const REACH = 2; // the maximum of the sliders, unless a gate is larger
const LIMIT = 1; // the deviation from 1 that has the strongest colour, the same for all prompts
const WRITTEN = 20; // the most columns of a heat map whose cells show their values
const FEW = 6; // the most columns whose values also fit a phone

const at = (id) => document.getElementById(id);
const side = (name) => at(`side-${name}`);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

let run; // the server's description of the run
let task = null; // the server's description of the chosen task
let theme = "light";
let asking = null; // the AbortController of the running answer
let asked = ""; // the question that the shown answers of router and base belong to
let byHand = false; // whether the gates are set by hand and not by the router
let shown = null; // the gates that the heat map shows
const mixtures = {}; // the last event with gates, by side

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(message, wrong = false) {
  at("status").textContent = message;
  at("status").classList.toggle("wrong", wrong);
}

function useTheme(next) {
  theme = next;
  document.documentElement.dataset.theme = theme;
  at("theme").textContent = theme === "dark" ? "Light" : "Dark";
  at("theme").setAttribute("aria-pressed", String(theme === "dark"));
  drawHeatMap();
}

// ── the server ──

async function request(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The studio does not answer; is it still running?");
  }
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

const get = async (address) => (await request(address)).json();

// Requests an answer and yields its server-sent events as they arrive. (EventSource supports only GET.)
async function* ask(question, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request("/api/answer", { method: "POST", headers, body: JSON.stringify(question), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) {
      const events = (rest + next.value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const [name, data] = event.split("\n");
        yield { name: name.slice("event: ".length), ...JSON.parse(data.slice("data: ".length)) };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // if the stream was interrupted, its error is already known
  }
}

// ── the prompt ──

async function chooseTask() {
  const name = at("task").value;
  const chosen = name ? await get(`/api/task?name=${encodeURIComponent(name)}`) : null;
  if (at("task").value !== name) return; // another task was chosen meanwhile
  task = chosen;
  at("instruction").hidden = !task;
  at("instruction").textContent = task?.instruction ?? "";
  at("text-label").textContent = task ? "Input" : "Prompt";
  at("example-label").hidden = !task?.examples.length;
  at("example").replaceChildren(...(task?.examples ?? []).map(({ input }, i) => {
    const line = input.trim().replace(/\s+/g, " ");
    return new Option(line.length > 60 ? `${line.slice(0, 59)}…` : line, String(i));
  }));
  if (task) chooseExample();
}

function chooseExample() {
  at("text").value = task.examples[Number(at("example").value)]?.input ?? "";
}

// ── answers ──

// Requests answers from the sides that have none to this prompt yet. Gates set by hand are always answered again.
async function answer() {
  asking?.abort();
  const question = { text: at("text").value, task: task?.name ?? null, max_new_tokens: Number(at("limit").value) };
  const prompt = JSON.stringify(question);
  const sides = [...(byHand ? ["hand"] : []), ...(prompt === asked ? [] : ["router", "base"])];
  if (!sides.length) return;
  const mine = new AbortController();
  asking = mine;
  at("stop").disabled = false;
  at("reference").hidden = true;
  for (const name of sides) {
    side(name).setAttribute("aria-busy", "true");
    side(name).classList.add("old");
    side(name).querySelector(".facts").textContent = "";
  }
  if (sides.includes("router")) asked = "";
  say("Answering …");
  try {
    let finished = false;
    for await (const event of ask({ ...question, sides, gates: byHand ? sliderGates() : null }, mine.signal)) {
      if (event.name === "error") throw new Error(event.message);
      finished = event.name === "done";
      EVENTS[event.name]?.(event);
    }
    if (!finished) throw new Error("The answer was interrupted; see the studio’s terminal for the reason.");
    asked = prompt;
    const references = task?.examples.find((example) => example.input === question.text)?.references;
    at("reference").hidden = !references;
    at("reference").textContent = references ? `Reference answer: ${references.join(" or ")}` : "";
    say("Done.");
  } catch (error) {
    if (asking === mine) say(mine.signal.aborted ? "Stopped." : error.message, !mine.signal.aborted);
  } finally {
    if (asking === mine) { // otherwise a newer question is running
      asking = null;
      at("stop").disabled = true;
      for (const name of SIDES) side(name).setAttribute("aria-busy", "false");
    }
  }
}

const EVENTS = {
  prompt({ text, tokens }) {
    at("read").hidden = false;
    at("read").querySelector("pre").textContent = text;
    at("read").querySelector("summary").textContent = `What the model reads (${tokens} tokens)`;
  },
  gates(event) {
    mixtures[event.side] = event;
    if (event.side === "router" && !byHand) placeSliders(routerGates());
    showMixture();
  },
  text(event) {
    side(event.side).classList.remove("old");
    side(event.side).querySelector(".text").textContent = event.text;
  },
  end(event) {
    const length = event.tokens === 1 ? "1 token" : `${event.tokens} tokens`;
    side(event.side).setAttribute("aria-busy", "false");
    side(event.side).querySelector(".text").textContent = event.text || "(no answer)";
    side(event.side).querySelector(".facts").textContent =
      `${length}${event.ended ? "" : ", cut at the limit"}, ${event.seconds.toFixed(1)} s`;
  },
};

// ── the gates: a heat map of experts × layers, and the nearest tasks ──

function showMixture() {
  const mixture = mixtures[byHand ? "hand" : "router"];
  if (!mixture) return;
  at("mixture-lead").textContent = byHand
    ? "The gates that you set: the weight of each expert. 1 is neutral."
    : "The prompt’s gates: the weight of each expert. 1 is neutral.";
  at("nearest").hidden = !mixture.nearest.length && !mixture.unmeasured;
  at("unmeasured").hidden = !mixture.unmeasured;
  at("nearest").querySelector("ol").replaceChildren(...mixture.nearest.map(({ task: name, difference }) =>
    element("li", {}, element("span", { textContent: name }), element("span", { textContent: difference.toFixed(4) }))));
  shown = mixture.gates;
  at("heat-map").hidden = false;
  drawHeatMap();
}

// Returns the gates by layer, of the chosen module or averaged over the layer's modules.
function layers() {
  const rows = new Map();
  run.modules.forEach(([layer, module], index) => {
    if (at("module").value && module !== at("module").value) return;
    rows.set(layer, [...(rows.get(layer) ?? []), shown[index]]);
  });
  return [...rows].map(([layer, gates]) => ({ name: layer < 0 ? "–" : String(layer), gates: mean(gates) }));
}

// The heat map is a table, so that screen readers can read its cells; the arrow keys move between them.
function drawHeatMap() {
  if (!shown) return;
  const columns = layers();
  const furthest = Math.max(...columns.flatMap(({ gates }) => gates.map((gate) => Math.abs(gate - 1))));
  const colours = run.colours[theme];
  const rows = columns[0].gates.map((_, expert) => element("tr", {},
    element("th", { textContent: `Expert ${expert}`, scope: "row" }),
    ...columns.map(({ name, gates }) => {
      const gate = gates[expert].toFixed(3);
      const cell = element("td", { tabIndex: -1 }, element("span", { textContent: gate }));
      cell.dataset.said = `Expert ${expert}, layer ${name}: gate ${gate}`;
      const [colour, ink] = coloursOf(colours, (gates[expert] - 1) / LIMIT);
      cell.style.backgroundColor = colour;
      cell.style.color = ink;
      return cell;
    })));
  rows[0].cells[1].tabIndex = 0;
  const step = columns.length > 16 ? 5 : 1; // fewer labels, so that they fit above narrow cells
  const heads = columns.map(({ name }, i) =>
    element("th", { textContent: i % step ? "" : name, scope: "col", ariaLabel: `layer ${name}` }));
  at("heat-map").querySelector("table").classList.toggle("written", columns.length <= WRITTEN);
  at("heat-map").querySelector("table").classList.toggle("few", columns.length <= FEW);
  at("heat-map").querySelector("table").replaceChildren(
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }), ...heads)), element("tbody", {}, ...rows));
  at("heat-map").querySelector(".bar").style.background = `linear-gradient(to right, ${colours.join(", ")})`;
  at("low").textContent = "0";
  at("high").textContent = furthest > LIMIT ? "2 or more" : "2";
  at("readout").textContent = "Columns are layers. Point at a cell, or select it with the arrow keys, to see its value.";
}

function readOut({ target }) {
  const cell = target.closest("td");
  if (cell) at("readout").textContent = cell.dataset.said;
}

function moveInHeatMap(event) {
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

// Returns the colour for a value from −1 to 1 on a scale of colour stops, such as #8f3b00, and that of text on it.
function coloursOf(stops, value) {
  const place = ((Math.max(-1, Math.min(1, value)) + 1) / 2) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [stops[below], stops[below + 1]].map((stop) =>
    [1, 3, 5].map((start) => Number.parseInt(stop.slice(start, start + 2), 16)));
  const colour = from.map((part, i) => Math.round(part + (to[i] - part) * (place - below)));
  const [red, green, blue] = colour;
  return [`rgb(${colour.join(" ")})`, 0.3 * red + 0.6 * green + 0.1 * blue > 135 ? "#15171a" : "#ffffff"];
}

const mean = (rows) => rows[0].map((_, expert) => rows.reduce((sum, row) => sum + row[expert], 0) / rows.length);

// ── one slider for each expert; the sliders show the router's gates until one is moved ──

const all = (selector) => [...document.querySelectorAll(selector)];
const sliderGates = () => all(".slider input[type=number]").map((number) => Number(number.value));
// The router's gates, averaged over modules.
const routerGates = () => (mixtures.router ? mean(mixtures.router.gates) : Array(run.experts).fill(NEUTRAL));

function placeSliders(gates) {
  const reach = Math.max(...gates) > REACH ? run.experts : REACH;
  all(".slider").forEach((row, expert) => {
    const [range, number] = row.querySelectorAll("input");
    range.max = String(reach);
    number.value = String(Number(gates[expert].toFixed(3)));
    range.value = number.value;
  });
}

function setMixture(gates, isByHand) {
  placeSliders(gates);
  byHand = isByHand;
  at("own").disabled = !byHand;
  side("hand").hidden = !byHand;
  side("router").querySelector("h3").textContent = byHand ? "With the prompt’s gates" : "With the adapter";
  if (byHand && at("text").value.trim()) answer();
  else showMixture();
}

function slider(expert) {
  const gate = { min: 0, value: NEUTRAL };
  const label = element("label", { textContent: `Expert ${expert}`, htmlFor: `gate-${expert}` });
  const range = element("input", { type: "range", id: `gate-${expert}`, max: REACH, step: 0.01, ...gate });
  const number = element("input", {
    type: "number", ariaLabel: `Gate of expert ${expert}`, max: run.experts, step: 0.001, ...gate,
  });
  const only = element("button", {
    type: "button", textContent: "Only", ariaLabel: `Only expert ${expert}: all others off`,
  });
  range.addEventListener("input", () => { number.value = range.value; });
  range.addEventListener("change", () => setMixture(sliderGates(), true));
  number.addEventListener("change", () => {
    if (!number.value || !number.checkValidity()) number.value = range.value;
    setMixture(sliderGates(), true);
  });
  only.addEventListener("click", () => setMixture(sliderGates().map((_, i) => (i === expert ? NEUTRAL : 0)), true));
  const said = run.abilities[expert] ? [element("p", { className: "said", textContent: `Used most by ${run.abilities[expert]}` })] : [];
  return element("div", { className: "slider" }, label, range, number, only, ...said);
}

// ── the run ──

async function start() {
  run = await get("/api/run");
  document.title = `${run.run} · badit studio`;
  at("run").textContent = run.run;
  at("about").textContent = `${run.method} on ${run.model}`
    + (run.tasks.length ? `, tuned on ${run.tasks.length} ${run.tasks.length === 1 ? "task" : "tasks"}` : "");
  at("remark").hidden = !run.remark;
  at("remark").textContent = run.remark;
  at("choices").hidden = !run.tasks.length;
  if (!run.needs_task) at("task").append(new Option("none: write a complete prompt", ""));
  for (const name of run.tasks) at("task").append(new Option(name, name));
  at("text").maxLength = run.max_characters;
  at("limit").max = run.max_new_tokens;
  at("limit").value = run.new_tokens;
  at("gates").hidden = !run.experts;
  at("no-gates").hidden = Boolean(run.experts);
  at("no-gates").textContent = `The method of this run, ${run.method}, mixes no experts. It has no gates `
    + "to show or to set.";
  const modules = [...new Set(run.modules.map(([, module]) => module))];
  at("modules").hidden = modules.length < 2;
  if (modules.length > 1) at("module").append(new Option("mean over modules", ""));
  for (const module of modules) at("module").append(new Option(module, module));
  at("hand").hidden = run.clustered;
  at("no-sliders").hidden = !run.clustered;
  if (!run.clustered) document.querySelector(".sliders").append(...Array.from({ length: run.experts }, (_, expert) => slider(expert)));
  if (run.tasks.length) {
    at("task").value = run.tasks[0];
    await chooseTask();
  }
  document.documentElement.dataset.ready = "true";
}

const fail = (error) => say(error.message, true);

at("theme").addEventListener("click", () => useTheme(theme === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => useTheme(dark.matches ? "dark" : "light"));
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  asked = ""; // answer again, because the user asked for it
  answer();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("stop").addEventListener("click", () => asking?.abort());
at("task").addEventListener("change", () => chooseTask().catch(fail));
at("example").addEventListener("change", chooseExample);
at("module").addEventListener("change", drawHeatMap);
at("heat-map").addEventListener("keydown", moveInHeatMap);
at("heat-map").addEventListener("pointerover", readOut);
at("heat-map").addEventListener("focusin", readOut);
at("own").addEventListener("click", () => setMixture(routerGates(), false));
at("neutral").addEventListener("click", () => setMixture(Array(run.experts).fill(NEUTRAL), true));

useTheme(dark.matches ? "dark" : "light");
start().catch(fail);
