// The tree of modules: repeated blocks folded, and only the lines in view in the document.

import { ask, make, replace } from "./ask.js";

const KINDS = { linear: "linear", embedding: "embedding", norm: "norm", conv2d: "conv" };
const MARGIN = 8; // lines that are drawn above and below the lines in view

// "0-3,7,head": successive numbers as a range.
export function spell(names) {
  const runs = [];
  for (const name of names) {
    const run = runs.at(-1);
    if (run && /^\d+$/.test(name) && /^\d+$/.test(run.at(-1)) && +name === +run.at(-1) + 1)
      run.push(name);
    else runs.push([name]);
  }
  return runs.map((run) => (run.length > 1 ? `${run[0]}-${run.at(-1)}` : run[0])).join(",");
}

export class Tree {
  // `picks` tells and changes the picks of the current delta; see picker.js.
  constructor(root, picks) {
    this.root = root;
    this.picks = picks;
    this.box = document.getElementById("tree");
    this.list = document.getElementById("rows");
    this.open = new Set([""]); // keys of lines that show the lines beneath
    this.apart = new Set(); // keys of folded lines that show their blocks one by one
    this.found = null; // names that a search found
    this.around = new Set(); // names of modules around those
    this.at = 0; // the chosen line
    this.anchor = 0; // the start of a range
    this.cache = new Map(); // key: names that a line stands for
    this.lines = [];
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("click", (event) => this.click(event));
    this.box.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.flatten();
  }

  // Open what is around these modules, and choose the first of them; without any, the largest.
  reveal(names) {
    const hits = this.linesWith(names);
    let line = hits[0]?.line ?? this.line(this.root, null, this.root.names);
    while (!hits.length && line.node.children.length) {
      const node = line.node.children.reduce((best, each) => (weight(each) > weight(best) ? each : best));
      line = this.line(node, line, node.names);
    }
    for (const each of [line, ...hits.map((hit) => hit.line)])
      for (let around = each.above; around; around = around.above) this.open.add(around.key);
    this.flatten();
    this.choose(this.lines.findIndex((each) => each.key === line.key));
  }

  line(node, above, names) {
    const steps = above ? [...above.steps, names] : [];
    const key = steps.map((step) => step.join("|")).join(".");
    return { node, above, names, steps, key, level: above ? above.level + 1 : 1 };
  }

  // The full names of all modules that a line stands for.
  namesOf(line) {
    if (!this.cache.has(line.key)) {
      let names = [""];
      for (const step of line.steps)
        names = names.flatMap((name) => step.map((last) => (name ? `${name}.${last}` : last)));
      this.cache.set(line.key, names);
    }
    return this.cache.get(line.key);
  }

  beneath(line) {
    if (this.apart.has(line.key))
      return line.names.map((name) => this.line(line.node, line.above, [name]));
    return line.node.children.map((node) => this.line(node, line, node.names));
  }

  isShown(line) {
    return !this.found || this.namesOf(line).some((n) => this.found.has(n) || this.around.has(n));
  }

  isOpen(line) {
    if (!line.node.children.length) return false;
    if (this.found && this.namesOf(line).some((name) => this.around.has(name))) return true;
    return this.open.has(line.key);
  }

  flatten() {
    const before = this.lines[this.at]?.key;
    this.lines = [];
    const visit = (line, level, place, count) => {
      this.lines.push({ ...line, shown: level, place, count });
      if (!this.isOpen(line)) return;
      const below = this.beneath(line).filter((each) => this.isShown(each));
      below.forEach((each, index) => visit(each, level + 1, index + 1, below.length));
    };
    visit(this.line(this.root, null, this.root.names), 1, 1, 1);
    const now = this.lines.findIndex((line) => line.key === before);
    this.at = now >= 0 ? now : Math.min(this.at, this.lines.length - 1);
    this.anchor = Math.min(this.anchor, this.lines.length - 1);
    this.draw();
  }

  // Show only the modules with these names, and what is around them; null: show all.
  filter(names) {
    this.found = names && new Set(names);
    this.around = new Set();
    for (const name of names ?? []) {
      for (let end = name.lastIndexOf("."); end > 0; end = name.lastIndexOf(".", end - 1))
        this.around.add(name.slice(0, end));
      if (name) this.around.add("");
    }
    this.box.scrollTop = 0;
    this.flatten();
    if (names) {
      const first = this.lines.findIndex((line) => this.namesOf(line).some((n) => this.found.has(n)));
      if (first >= 0) this.choose(first, false);
    }
  }

  // All folded lines of the whole model, with those of their names that are in `names`.
  linesWith(names) {
    const wanted = new Set(names);
    const hits = [];
    const visit = (line) => {
      const own = this.namesOf(line).filter((name) => wanted.has(name));
      if (own.length) hits.push({ line, own });
      for (const node of line.node.children) visit(this.line(node, line, node.names));
    };
    visit(this.line(this.root, null, this.root.names));
    return hits;
  }

  // ------------------------------------------------------------------------------------ drawing
  get height() {
    return parseFloat(getComputedStyle(this.box).getPropertyValue("--row")) || 28;
  }

  draw() {
    const height = this.height;
    const first = Math.max(0, Math.floor(this.box.scrollTop / height) - MARGIN);
    const last = Math.ceil((this.box.scrollTop + this.box.clientHeight) / height) + MARGIN;
    this.list.style.height = `${this.lines.length * height}px`;
    const drawn = this.lines.slice(first, last);
    replace(this.list, ...drawn.map((line, index) => this.row(line, first + index)));
    this.box.setAttribute("aria-activedescendant", `row-${this.at}`);
    this.picks.need(drawn.map((line) => this.namesOf(line)[0]));
  }

  row(line, index) {
    const { node } = line;
    const names = this.namesOf(line);
    const why = this.picks.why(names[0]);
    const state = this.picks.state(names);
    const fits = why === null;
    const opens = node.children.length > 0;
    const row = make("div", {
      id: `row-${index}`,
      class: `row${why ? " unfit" : ""}${index === this.at ? " at" : ""}${opens ? "" : " leaf"}`,
      role: "treeitem",
      "data-key": line.key,
      "data-name": names[0],
      "aria-level": line.shown,
      "aria-posinset": line.place,
      "aria-setsize": line.count,
      "aria-selected": String(index === this.at),
      "aria-expanded": opens ? String(this.isOpen(line)) : null,
      "aria-checked": fits || state !== "false" ? state : null,
      "aria-label": label(line, names.length, why),
      title: why ?? null,
    });
    row.style.top = `${index * this.height}px`;
    row.style.setProperty("--level", line.shown - 1);
    row.append(
      make("span", { class: opens ? "twist" : "twist none", "aria-hidden": "true" }),
      make("span", { class: fits || state !== "false" ? "box" : "box none", "aria-hidden": "true" }),
      make("span", { class: "name" }, line.steps.length ? spell(line.names) : "root"),
      names.length > 1 ? make("span", { class: "times" }, `× ${names.length}`) : "",
      make("span", { class: "type" }, node.type),
      why && !opens ? make("span", { class: "why" }, why.replace(/^.*?\) (?=cannot)/, "")) : "",
      make("span", { class: "gap" }),
      ...this.picks.marks(names, opens && !this.isOpen(line)),
      ...node.carries.map((name) =>
        make("span", { class: "mark", title: "on the model already" }, name),
      ),
      make("span", { class: "role" }, node.role || KINDS[node.kind] || ""),
      make("span", { class: "sizes" }, sizes(node)),
    );
    return row;
  }

  // ---------------------------------------------------------------------------------- choosing
  choose(index, anchor = true) {
    this.at = Math.max(0, Math.min(index, this.lines.length - 1));
    if (anchor) this.anchor = this.at;
    const height = this.height;
    const top = this.at * height;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + height > this.box.scrollTop + this.box.clientHeight)
      this.box.scrollTop = top + height - this.box.clientHeight;
    this.draw();
    this.picks.chosen(this.lines[this.at]);
  }

  toggle(line, open = !this.isOpen(line)) {
    if (open) this.open.add(line.key);
    else this.open.delete(line.key);
    this.flatten();
  }

  // The line of all blocks that look like those of a line.
  whole(line) {
    return this.line(line.node, line.above, line.node.names);
  }

  // Show blocks one by one, or fold them again.
  fold(line) {
    const { key } = this.whole(line);
    if (!this.apart.delete(key)) this.apart.add(key);
    this.open.add(key);
    this.flatten();
    this.choose(this.lines.findIndex((each) => each.key === key));
  }

  async range(index) {
    const [from, to] = [Math.min(this.anchor, index), Math.max(this.anchor, index)];
    const lines = this.lines.slice(from, to + 1);
    await this.picks.need(lines.map((line) => this.namesOf(line)[0]), true);
    const fitting = lines.filter((line) => this.picks.why(this.namesOf(line)[0]) === null);
    this.picks.add(fitting.flatMap((line) => this.namesOf(line)));
    this.choose(index, false);
  }

  async click(event) {
    const { key } = event.target.closest(".row")?.dataset ?? {};
    const index = this.lines.findIndex((line) => line.key === key);
    if (index < 0) return;
    const line = this.lines[index];
    if (event.target.classList.contains("twist") && line.node.children.length) {
      this.choose(index);
      this.toggle(line);
    } else if (event.shiftKey) {
      await this.range(index);
    } else {
      if (event.target.classList.contains("box")) this.picks.toggle(this.namesOf(line));
      this.choose(index);
    }
  }

  async key(event) {
    const line = this.lines[this.at];
    const page = Math.floor(this.box.clientHeight / this.height) - 1;
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
    const ends = { Home: -this.lines.length, End: this.lines.length };
    const letter = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves || event.key in ends) {
      const to = Math.max(0, Math.min(this.at + (moves[event.key] ?? ends[event.key]), this.lines.length - 1));
      if (event.shiftKey) await this.range(to);
      else this.choose(to);
    } else if (event.key === "ArrowRight") {
      if (line.node.children.length && !this.isOpen(line)) this.toggle(line, true);
      else if (this.isOpen(line)) this.choose(this.at + 1);
    } else if (event.key === "ArrowLeft") {
      if (this.isOpen(line) && !this.found) this.toggle(line, false);
      else this.choose(this.lines.findLastIndex((l, i) => i < this.at && l.shown < this.lines[this.at].shown));
    } else if (event.key === " " || event.key === "Enter") {
      this.picks.toggle(this.namesOf(line));
    } else if (letter === "a") {
      this.picks.alike(this.namesOf(line));
    } else if (letter === "u" && line.node.names.length > 1) {
      this.fold(line);
    } else if (event.key === "/") {
      document.getElementById("search").focus();
    } else return;
    event.preventDefault();
  }
}

function weight(node) {
  return node.parameters * node.names.length;
}

function sizes(node) {
  const [read, width] = node.sizes;
  return width ? (read ? `${read} → ${width}` : `${width}`) : "";
}

function label(line, count, why) {
  const { node } = line;
  const parts = [line.steps.length ? spell(line.names) : "root", node.type];
  if (count > 1) parts.push(`${count} modules`);
  if (node.role) parts.push(`role ${node.role}`);
  if (sizes(node)) parts.push(sizes(node).replace("→", "to"));
  if (why) parts.push(why);
  return parts.join(", ");
}
