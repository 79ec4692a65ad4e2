// The state of the page: deltas in their order, their picks, and the plan of them.

import { ask, make, redraw, settled, watch } from "./ask.js";
import { drawDeltas, drawForm, drawRemarks } from "./deltas.js";
import { Tree, spell } from "./tree.js";

const at = (id) => document.getElementById(id);
const COLOURS = 6;
const KEPT = `opendelta ${location.pathname}`; // where a page that is loaded again finds its picks

class Page {
  constructor(opened) {
    this.methods = opened.methods;
    this.only = opened.only;
    this.reasons = new Map(); // key of a delta's options: {name: why not, or null}
    this.plans = new Map(); // id of a delta: its part of the last plan
    this.text = { python: "", words: "" };
    this.tab = "python";
    this.count = 0;
    const kept = this.kept();
    this.deltas = (kept ?? opened.deltas).map((delta) => this.fresh(delta));
    this.current = this.deltas[0] ?? null;
    this.replan = settled(() => this.plan(), 120);
    this.look = settled(() => this.fetchReasons(), 40);
    this.wanted = new Set();
    this.tree = new Tree(opened.tree, this);
    at("model").textContent =
      `${opened.model}, ${opened.parameters.toLocaleString("en")} parameters`;
    if (opened.carries.length) {
      at("carries").hidden = false;
      at("carries").textContent = `On the model already, beneath these: ${opened.carries.join(", ")}`;
    }
    at("new").replaceChildren(
      ...this.methods.map((method) => make("option", { value: method.type }, method.type)),
    );
    this.listen();
    drawForm(this);
    this.changed();
    this.tree.draw();
  }

  listen() {
    at("add-delta").addEventListener("click", () => this.append(at("new").value));
    at("submit").addEventListener("click", () => this.submit());
    at("cancel").addEventListener("click", () => {
      at("cancel").disabled = true;
      ask("cancel");
    });
    at("copy").addEventListener("click", () => this.copy());
    for (const tab of ["python", "words"])
      at(`tab-${tab}`).addEventListener("click", () => this.show(tab));
    at("tab-python").parentElement.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      this.show(this.tab === "python" ? "words" : "python");
      at(`tab-${this.tab}`).focus();
    });
    const search = settled(() => this.search(at("search").value.trim()), 120);
    at("search").addEventListener("input", search);
    at("search").addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        at("search").value = "";
        search();
      } else if (event.key === "Enter" || event.key === "ArrowDown") {
        event.preventDefault();
        at("tree").focus();
      }
    });
  }

  // ------------------------------------------------------------------------------- the deltas
  fresh(delta) {
    const id = this.count++;
    const places = delta.places && [...delta.places];
    return { ...delta, places, defaults: null, id, colour: id % COLOURS };
  }

  method(type) {
    return this.methods.find((method) => method.type === type);
  }

  told(delta) {
    return this.plans.get(delta.id) ?? {};
  }

  append(type) {
    const delta = this.fresh({ type, options: {}, places: null });
    this.deltas.push(delta);
    this.choose(delta);
    this.changed();
  }

  remove(delta) {
    const index = this.deltas.indexOf(delta);
    this.deltas.splice(index, 1);
    if (this.current === delta) this.choose(this.deltas[Math.min(index, this.deltas.length - 1)]);
    this.changed();
  }

  move(delta, index) {
    if (index < 0 || index >= this.deltas.length) return;
    this.deltas.splice(this.deltas.indexOf(delta), 1);
    this.deltas.splice(index, 0, delta);
    this.say(`${this.told(delta).name ?? delta.type} is number ${index + 1} of ${this.deltas.length}`);
    this.changed();
  }

  choose(delta) {
    this.current = delta ?? null;
    drawDeltas(this);
    drawForm(this);
    this.tree.draw();
    this.chosen(this.tree.lines[this.tree.at]);
  }

  retype(delta, type) {
    const known = new Set(this.method(type).options.map((option) => option.name));
    const paired = this.method(type).paired !== this.method(delta.type).paired;
    for (const name of Object.keys(delta.options)) if (!known.has(name)) delete delta.options[name];
    Object.assign(delta, { type, places: paired ? null : delta.places, defaults: null });
    this.plans.delete(delta.id);
    drawForm(this);
    at("method").focus();
    this.changed();
  }

  set(delta, name, value) {
    delta.options[name] = value;
    this.changed(false);
  }

  place(delta, places) {
    delta.places = places;
    this.changed();
  }

  // After any change: keep it, draw it, and plan anew.
  changed() {
    sessionStorage.setItem(KEPT, JSON.stringify(this.wire()));
    drawDeltas(this);
    drawRemarks(this);
    this.tree.draw();
    this.replan();
  }

  kept() {
    try {
      return JSON.parse(sessionStorage.getItem(KEPT));
    } catch {
      return null;
    }
  }

  wire() {
    return this.deltas.map(({ type, options, places }) => ({ type, options, places }));
  }

  // -------------------------------------------------------------------------------- the picks
  // {start: end} of a delta's modules; the end is the start unless the method takes pairs.
  pairs(delta) {
    const places = delta.places ?? delta.defaults ?? [];
    if (delta.seen !== places) {
      const step = this.method(delta.type).paired ? 2 : 1;
      const map = new Map();
      for (let i = 0; i < places.length; i += step) map.set(places[i], places[i + step - 1]);
      const around = new Set();
      for (const name of map.keys())
        for (let end = name.lastIndexOf("."); end > 0; end = name.lastIndexOf(".", end - 1))
          around.add(name.slice(0, end));
      Object.assign(delta, { seen: places, map, around });
    }
    return delta.map;
  }

  // A pick changes the default places, so they must be known; they stay known while an option is
  // wrong.
  knows(delta) {
    if (!delta) this.say("There is no delta: add one");
    else if (!delta.places && !delta.defaults)
      this.say(`The default places are not known yet: ${this.told(delta).error ?? "being planned"}`);
    return Boolean(delta?.places ?? delta?.defaults);
  }

  setPairs(delta, map) {
    const paired = this.method(delta.type).paired;
    delta.places = paired ? [...map].flat() : [...map.keys()];
    this.changed();
  }

  state(names, delta = this.current) {
    if (!delta) return "false";
    const map = this.pairs(delta);
    const count = names.reduce((sum, name) => sum + map.has(name), 0);
    return count === 0 ? "false" : count === names.length ? "true" : "mixed";
  }

  // The other deltas on a line; of a closed line also the deltas inside it.
  marks(names, closed) {
    const mark = (delta, inside) =>
      make(
        "span",
        { class: `mark mark-${delta.colour}${inside ? " inside" : ""}`, title: inside ? "inside" : null },
        this.told(delta).name ?? delta.type,
      );
    return this.deltas.flatMap((delta) => {
      if (delta !== this.current && this.state(names, delta) !== "false") return [mark(delta, false)];
      this.pairs(delta);
      const inside = closed && names.some((name) => delta.around.has(name));
      return inside ? [mark(delta, true)] : [];
    });
  }

  toggle(names) {
    const delta = this.current;
    if (!this.knows(delta)) return;
    if (this.state(names) !== "true") {
      if (this.why(names[0]) === null) this.add(names);
      else this.say(this.refusal([names[0]]));
      return;
    }
    const map = new Map(this.pairs(delta));
    names.forEach((name) => map.delete(name));
    this.setPairs(delta, map);
  }

  add(names) {
    if (!this.knows(this.current)) return;
    const map = new Map(this.pairs(this.current));
    names.forEach((name) => map.has(name) || map.set(name, name));
    this.setPairs(this.current, map);
  }

  async alike(names) {
    if (!this.knows(this.current)) return;
    const { type, options } = this.current;
    const reply = await ask("alike", { delta: { type, options }, names });
    if (reply.error || !reply.names.length) this.say(reply.error ?? this.refusal([names[0]]));
    else this.add(reply.names);
  }

  // ------------------------------------------------------------------- why a method does not go
  get asked() {
    const { type, options } = this.current;
    const key = JSON.stringify({ type, options });
    if (!this.reasons.has(key)) this.reasons.set(key, new Map());
    return this.reasons.get(key);
  }

  // Why the current delta cannot go on a module; null: it can; undefined: not known yet.
  why(name) {
    if (!this.current) return undefined;
    if (this.asked.has(name)) return this.asked.get(name);
    return this.last?.type === this.current.type ? this.last.reasons.get(name) : undefined;
  }

  // What to say where none of these modules can be picked.
  refusal(names) {
    const { type } = this.current;
    const reasons = names.map((name) => this.why(name));
    if (reasons.length === 1 && reasons[0]) return reasons[0];
    if (!reasons.includes(undefined)) return `${type} goes on none of these`;
    return `Where ${type} goes is not known yet: ${this.told(this.current).error ?? "being planned"}`;
  }

  async need(names, wait = false) {
    if (!this.current) return;
    const missing = names.filter((name) => !this.asked.has(name));
    if (!missing.length) return;
    missing.forEach((name) => this.wanted.add(name));
    if (wait) await this.fetchReasons();
    else this.look();
  }

  async fetchReasons() {
    const delta = this.current;
    const names = [...this.wanted];
    this.wanted.clear();
    if (!delta || !names.length) return;
    const reasons = this.asked;
    const { type, options } = delta;
    const reply = await ask("fits", { delta: { type, options }, names });
    if (reply.error) return; // the plan shows it
    for (const [name, why] of Object.entries(reply.reasons)) reasons.set(name, why);
    this.last = { type, reasons };
    this.tree.draw();
    this.chosen(this.tree.lines[this.tree.at]);
  }

  // ------------------------------------------------------------------------------- the search
  async search(text) {
    const reply = text ? await ask("search", { text }) : { ways: [], reason: "" };
    const ways = reply.ways ?? [];
    at("found").textContent = reply.error ?? reply.reason;
    at("ways").replaceChildren(...ways.map((way, index) => this.way(way, index === 0)));
    if (ways.length) this.take(ways[0]);
    else this.tree.filter(text && !reply.error ? [] : null);
  }

  way(way, first) {
    return make(
      "button",
      {
        type: "button",
        class: "way",
        "aria-pressed": String(first),
        onclick: (event) => {
          for (const other of at("ways").children) other.setAttribute("aria-pressed", "false");
          event.currentTarget.setAttribute("aria-pressed", "true");
          this.take(way);
        },
      },
      make("span", { class: "quiet" }, way.how),
      make("code", {}, way.place),
      make("span", { class: "quiet" }, String(way.names.length)),
    );
  }

  take(way) {
    this.tree.filter(way.names);
    const role = way.how === "role" ? ", common_structure=True" : "";
    const select = make(
      "button",
      { type: "button", onclick: () => this.pickFound(way.names) },
      `Select these ${way.names.length.toLocaleString("en")}`,
    );
    at("found").replaceChildren(
      select,
      make("code", {}, `modified_modules=[${JSON.stringify(way.place)}]${role}`),
      make("span", { id: "unfit", class: "wrong" }),
    );
  }

  async pickFound(names) {
    if (!this.knows(this.current)) return;
    const hits = this.tree.linesWith(names);
    const firsts = hits.map(({ own }) => own[0]);
    await this.need(firsts, true);
    const fitting = hits.filter(({ own }) => this.why(own[0]) === null);
    at("unfit").textContent = fitting.length ? "" : this.refusal(firsts);
    if (fitting.length) this.add(fitting.flatMap(({ own }) => own));
  }

  // --------------------------------------------------------------------------------- the plan
  async plan() {
    const deltas = [...this.deltas];
    const wire = this.wire();
    const reply = await ask("plan", { deltas: wire });
    at("problem").textContent = reply.error ?? "";
    if (reply.error) return;
    deltas.forEach((delta, index) => {
      const told = reply.deltas[index];
      this.plans.set(delta.id, told);
      const { type, places } = wire[index];
      if (told.places && !places && type === delta.type) delta.defaults = told.places;
    });
    this.text = { python: reply.python, words: reply.words };
    at("figures").replaceChildren(
      ...reply.figures.map(({ label, figure, note }, index) =>
        make(
          "div",
          { title: reply.costs[index] },
          make("dt", {}, label),
          make("dd", {}, figure, make("span", { class: "quiet" }, note)),
        ),
      ),
    );
    const wrong = deltas.filter((delta) => this.told(delta).error);
    const count = deltas.length - wrong.length;
    this.say(
      [
        ...wrong.map((delta) => `${delta.type} does not fit: ${this.told(delta).error}`),
        `Plan of ${count} delta${count === 1 ? "" : "s"}: ${reply.figures[0].figure} parameters`,
      ].join("; "),
    );
    this.show(this.tab);
    drawDeltas(this);
    drawRemarks(this);
    if (this.opened) this.tree.draw();
    else this.tree.reveal(this.current ? [...this.pairs(this.current).keys()] : []);
    this.opened = true;
    this.chosen(this.tree.lines[this.tree.at]);
  }

  show(tab) {
    this.tab = tab;
    for (const each of ["python", "words"]) {
      at(`tab-${each}`).setAttribute("aria-selected", String(each === tab));
      at(`tab-${each}`).tabIndex = each === tab ? 0 : -1;
    }
    at("text").setAttribute("aria-labelledby", `tab-${tab}`);
    at("text").textContent = this.text[tab] || "Nothing is picked yet.";
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.text[this.tab]);
      this.say("Copied");
      at("copy").textContent = "Copied";
      setTimeout(() => (at("copy").textContent = "Copy"), 1500);
    } catch {
      getSelection().selectAllChildren(at("text"));
      this.say("Selected: press Ctrl-C");
    }
  }

  // ---------------------------------------------------------------------------- the chosen line
  async chosen(line) {
    const names = this.tree.namesOf(line);
    const why = this.why(names[0]);
    const state = this.state(names);
    const full = line.steps.map(spell).join(".");
    const button = (focus, text, action) =>
      make("button", { type: "button", "data-focus": focus, onclick: action }, text);
    const several = this.tree.lines.length > 1 && /(^|\.)\d+(\.|$)/.test(names[0]);
    const formula = make("code", { id: "formula" });
    const steps = make("span", { id: "steps", class: "quiet" });
    redraw(
      at("module"),
      () => at("tree"),
      make(
        "p",
        { class: "where" },
        make("code", {}, full || "root"),
        make("span", { class: "type" }, line.node.type),
        line.node.role ? make("span", { class: "role" }, line.node.role) : "",
      ),
      why ? make("p", { class: "hint" }, why) : "",
      make("p", { class: "formula" }, formula, steps),
      make(
        "p",
        { class: "actions" },
        why === null || state !== "false"
          ? button("toggle", state === "true" ? "Take out" : "Select", () => this.toggle(names))
          : "",
        several && names.length === 1 && why === null
          ? button("alike", "Select the same in all blocks", () => this.alike(names))
          : "",
        line.node.names.length > 1
          ? button(
              "fold",
              this.tree.apart.has(this.tree.whole(line).key) ? "Fold these blocks" : "Show blocks one by one",
              () => this.tree.fold(line),
            )
          : "",
        this.ending(line, names, state),
      ),
    );
    const reply = await ask("explain", { name: names[0], deltas: this.wire() });
    if (reply.error) return;
    if (this.tree.lines[this.tree.at]?.key !== line.key) return;
    formula.textContent = reply.formula;
    steps.textContent = reply.steps.slice(1).join(" · ");
  }

  // Where the branch of a method that takes pairs ends: a choice among the modules of the block.
  ending(line, names, state) {
    const delta = this.current;
    if (!delta || !this.method(delta.type).paired || state !== "true") return "";
    let block = line;
    while (block.above && block.above.names.length === 1 && !/^\d+$/.test(block.above.names[0]))
      block = block.above;
    block = block.above ?? block;
    const ends = [];
    const visit = (each) => {
      if (this.tree.namesOf(each).length === names.length && ends.length < 60) ends.push(each);
      each.node.children.forEach((node) => visit(this.tree.line(node, each, node.names)));
    };
    block.node.children.forEach((node) => visit(this.tree.line(node, block, node.names)));
    const end = this.pairs(delta).get(names[0]);
    const select = make(
      "select",
      {
        id: "ending",
        "data-focus": "ending",
        onchange: (event) => {
          const chosen = this.tree.namesOf(ends[+event.target.value]);
          const map = new Map(this.pairs(delta));
          names.forEach((name, index) => map.set(name, chosen[index]));
          this.setPairs(delta, map);
        },
      },
      ...ends.map((each, index) =>
        make(
          "option",
          { value: index, selected: this.tree.namesOf(each)[0] === end },
          each.steps.slice(block.steps.length).map(spell).join("."),
        ),
      ),
    );
    return make("label", {}, "Branch ends at ", select);
  }

  // ---------------------------------------------------------------------------------- the end
  async submit() {
    at("submit").disabled = true;
    const reply = await ask("submit", { deltas: this.wire() });
    at("submit").disabled = false;
    at("problem").textContent = reply.error ?? "";
    if (reply.error) this.say("");
  }

  say(text) {
    at("said").textContent = text;
  }
}

const ENDS = {
  submitted: "Done: the picks are in Python. You can close this page.",
  cancelled: "Picking was cancelled. You can close this page.",
  lost: "The session has ended: opendelta no longer answers. You can close this page.",
};

function over(how) {
  if (how !== "lost") sessionStorage.removeItem(KEPT); // a page that is loaded again is lost too
  for (const part of document.querySelectorAll("header, main, footer")) part.inert = true;
  at("ended").hidden = false;
  at("ended-text").textContent = ENDS[how] ?? how;
  at("ended-text").focus();
}

addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});
watch(over);
const opened = await ask("open");
if (opened.error) over(opened.error);
else globalThis.picker = new Page(opened);
