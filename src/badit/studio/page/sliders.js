// One slider for each expert. They follow the router until one of them is moved.

const NEUTRAL = 1;
const REACH = 2; // how far a slider goes, where gates do not go further themselves

export class Sliders {
  // `changed` is called when a mixture has been set by hand, and when it is the router's own again.
  constructor(run, changed) {
    this.run = run;
    this.changed = changed;
    this.byHand = false;
    this.router = null;
    this.own = document.getElementById("own");
    this.rows = Array.from({ length: run.experts }, (_, expert) => this.row(expert));
    document.querySelector(".sliders").append(...this.rows.map(({ element }) => element));
    this.own.addEventListener("click", () => this.reset());
    document.getElementById("neutral").addEventListener("click", () => this.set(() => NEUTRAL));
  }

  get gates() {
    return this.rows.map(({ number }) => Number(number.value));
  }

  // The router's gates for a prompt, by module: the sliders show the mean over modules.
  follow(gates) {
    this.router = this.rows.map((_, expert) => gates.reduce((sum, row) => sum + row[expert], 0) / gates.length);
    if (!this.byHand) this.place(this.router);
  }

  reset() {
    this.byHand = false;
    this.own.disabled = true;
    this.place(this.router ?? this.rows.map(() => NEUTRAL));
    this.changed();
  }

  set(gateOf) {
    this.place(this.rows.map((_, expert) => gateOf(expert)));
    this.setByHand();
  }

  setByHand() {
    this.byHand = true;
    this.own.disabled = false;
    this.changed();
  }

  place(gates) {
    const reach = Math.max(...gates) > REACH ? this.run.experts : REACH;
    this.rows.forEach(({ range, number }, expert) => {
      range.max = String(reach);
      number.value = String(Number(gates[expert].toFixed(3)));
      range.value = number.value;
    });
  }

  row(expert) {
    const name = `Expert ${expert}`;
    const element = Object.assign(document.createElement("div"), { className: "slider" });
    const label = Object.assign(document.createElement("label"), { textContent: name, htmlFor: `gate-${expert}` });
    const range = input("range", { id: `gate-${expert}`, max: REACH });
    const number = input("number", { max: this.run.experts, step: 0.001 });
    number.setAttribute("aria-label", `Gate of expert ${expert}`);
    const only = Object.assign(document.createElement("button"), { type: "button", textContent: "Only" });
    only.setAttribute("aria-label", `Only expert ${expert}: all others off`);
    range.addEventListener("input", () => { number.value = range.value; });
    range.addEventListener("change", () => this.setByHand());
    number.addEventListener("change", () => {
      if (!number.value || !number.checkValidity()) number.value = range.value;
      this.place(this.gates);
      this.setByHand();
    });
    only.addEventListener("click", () => this.set((other) => (other === expert ? NEUTRAL : 0)));
    element.append(label, range, number, only);
    const said = this.run.abilities[expert];
    if (said) element.append(Object.assign(document.createElement("p"), { className: "said", textContent: said }));
    return { element, range, number };
  }
}

function input(type, options) {
  return Object.assign(document.createElement("input"), { type, min: 0, step: 0.01, ...options, value: NEUTRAL });
}
