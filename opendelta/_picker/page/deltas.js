// The list of deltas, whose order can be dragged or moved by keys, and the form of the current one.

import { make, redraw } from "./ask.js";

// `page` has the deltas, the current one, and what to do when one changes; see picker.js.
export function drawDeltas(page) {
  const list = document.getElementById("deltas");
  const nearest = (held) =>
    list.querySelector(`[data-focus="choose-${held.split("-").at(-1)}"]`) ??
    list.querySelector('[aria-pressed="true"]') ??
    document.getElementById("add-delta");
  redraw(list, nearest, ...page.deltas.map((delta, index) => item(page, delta, index)));
  document.getElementById("add").hidden = page.only;
  document.getElementById("order").hidden = page.deltas.length < 2;
}

function item(page, delta, index) {
  const told = page.told(delta);
  const name = told.name ?? delta.options.name ?? delta.type;
  const last = page.deltas.length - 1;
  const button = (what, sign, action, disabled) =>
    make(
      "button",
      {
        type: "button",
        class: "icon",
        title: `${what} ${name}`,
        "aria-label": `${what} ${name}`,
        "data-focus": `${what}-${delta.id}`,
        disabled,
        onclick: action,
      },
      sign,
    );
  const line = make(
    "li",
    { class: `delta mark-${delta.colour}`, "aria-current": delta === page.current ? "true" : null },
    make("span", { class: "grip", "aria-hidden": "true", title: "Drag to change the order" }, "⠿"),
    make(
      "button",
      {
        type: "button",
        class: "choose",
        "data-focus": `choose-${delta.id}`,
        "aria-pressed": String(delta === page.current),
        "aria-describedby": "order",
        onclick: () => page.choose(delta),
        onkeydown: (event) => {
          const by = event.altKey ? { ArrowUp: -1, ArrowDown: 1 }[event.key] : 0;
          if (!by) return;
          event.preventDefault();
          page.move(delta, index + by);
        },
      },
      make("span", { class: "dot", "aria-hidden": "true" }),
      make("strong", {}, name),
      name === delta.type ? "" : make("span", { class: "quiet" }, delta.type),
      make("span", { class: told.error ? "wrong count" : "quiet count" }, summary(told)),
    ),
    page.only || !last ? "" : button("Move up", "↑", () => page.move(delta, index - 1), index === 0),
    page.only || !last
      ? ""
      : button("Move down", "↓", () => page.move(delta, index + 1), index === last),
    page.only ? "" : button("Remove", "×", () => page.remove(delta), false),
  );
  line.querySelector(".grip").addEventListener("pointerdown", (event) => drag(page, delta, event));
  return line;
}

function summary(told) {
  if (told.error) return "does not fit";
  if (told.modules === undefined) return "being planned";
  return `${told.modules.toLocaleString("en")} modules, ${told.parameters.toLocaleString("en")} parameters`;
}

// Move a delta while its grip is dragged over the other lines.
function drag(page, delta, event) {
  if (page.only) return;
  event.preventDefault();
  const list = document.getElementById("deltas");
  list.classList.add("dragged");
  const over = (moved) => {
    const lines = [...list.children];
    const at = lines.findIndex((line) => {
      const { top, bottom } = line.getBoundingClientRect();
      return moved.clientY >= top && moved.clientY <= bottom;
    });
    if (at >= 0 && at !== page.deltas.indexOf(delta)) page.move(delta, at);
  };
  const stop = () => {
    list.classList.remove("dragged");
    removeEventListener("pointermove", over);
    removeEventListener("pointerup", stop);
    removeEventListener("pointercancel", stop);
  };
  addEventListener("pointermove", over);
  addEventListener("pointerup", stop);
  addEventListener("pointercancel", stop);
}

// ------------------------------------------------------------------------------------ the form
export function drawForm(page) {
  const box = document.getElementById("form");
  const delta = page.current;
  if (!delta) {
    box.replaceChildren(make("p", { class: "hint" }, "Add a delta to pick modules for it."));
    return;
  }
  const method = page.method(delta.type);
  const open = box.querySelector("details")?.open ?? false;
  const own = method.options.filter((option) => option.own);
  const common = method.options.filter((option) => !option.own);
  box.replaceChildren(
    page.only ? make("h2", {}, method.class) : chooser(page, delta),
    make("p", { class: "hint" }, method.about),
    make("p", { class: "hint" }, `Goes on: ${method.takes.join("; ")}.`),
    make("div", { id: "remarks" }),
    ...own.map((option) => field(page, delta, option)),
    make(
      "details",
      { open },
      make("summary", {}, "Options that every delta has"),
      ...common.map((option) => field(page, delta, option)),
    ),
  );
  drawRemarks(page);
}

// The errors and remarks of the plan on the current delta; no input that is in use is touched.
export function drawRemarks(page) {
  const delta = page.current;
  if (!delta) return;
  const told = page.told(delta);
  const box = document.getElementById("remarks");
  const atFields = page
    .method(delta.type)
    .options.filter((option) => markField(option, told.error ?? "")).length;
  redraw(
    box,
    () => box.querySelector("button"),
    told.error && !atFields ? make("p", { class: "wrong" }, told.error) : "",
    ...(told.remarks ?? []).map((remark) => make("p", { class: "remark" }, remark)),
    make(
      "div",
      { class: "places" },
      make(
        "button",
        {
          type: "button",
          "data-focus": "default",
          "aria-pressed": String(delta.places === null),
          onclick: () => page.place(delta, null),
        },
        "Default places",
      ),
      make(
        "button",
        { type: "button", "data-focus": "none", onclick: () => page.place(delta, []) },
        "Select none",
      ),
    ),
  );
}

// Show an error at the field of an option if the error names it; return whether it does.
function markField(option, error) {
  const input = document.getElementById(`option-${option.name}`);
  const named = new RegExp(`(^|[^\\w.])${option.name}=`).test(error);
  const shown = document.getElementById(`${input.id}-error`);
  if (shown.textContent !== (named ? error : "")) shown.textContent = named ? error : "";
  input.setAttribute("aria-invalid", String(named));
  if (named && input.closest("details")) input.closest("details").open = true;
  return named;
}

function chooser(page, delta) {
  const select = make(
    "select",
    { id: "method", onchange: (event) => page.retype(delta, event.target.value) },
    ...page.methods.map((method) =>
      make("option", { value: method.type, selected: method.type === delta.type }, method.type),
    ),
  );
  return make("div", { class: "field method" }, make("label", { for: "method" }, "Method"), select);
}

function field(page, delta, option) {
  const id = `option-${option.name}`;
  const value = option.name in delta.options ? delta.options[option.name] : option.default;
  const changed = JSON.stringify(value) !== JSON.stringify(option.default);
  const input = (inputs[option.kind] ?? typed)(option, value);
  input.id = id;
  input.setAttribute("aria-describedby", `${id}-error ${id}-meaning`);
  input.addEventListener(option.kind === "choice" ? "change" : "input", () => {
    const given = (read[option.kind] ?? readText)(input, option);
    const same = JSON.stringify(given) === JSON.stringify(option.default);
    label.classList.toggle("changed", !same);
    page.set(delta, option.name, given);
  });
  const label = make("label", { for: id, class: changed ? "changed" : null }, option.name);
  return make(
    "div",
    { class: `field ${option.kind}` },
    label,
    input,
    make("p", { class: "wrong", id: `${id}-error` }),
    make("p", { class: "hint", id: `${id}-meaning` }, `${option.meaning} ${limits(option)}`.trim()),
  );
}

function limits(option) {
  const parts = [];
  if (option.minimum !== null) parts.push(`at least ${option.minimum}`);
  if (option.below !== null) parts.push(`below ${option.below}`);
  if (option.multiple_of !== null) parts.push(`a multiple of ${option.multiple_of}`);
  if (option.kind === "lines") parts.push("one a line");
  if (option.kind === "json") parts.push("as JSON");
  const known = option.kind === "flag" || option.kind === "choice" || option.default === null;
  const text = option.kind === "text" ? JSON.stringify(option.default) : option.default;
  if (!known) parts.push(`default ${text}`);
  return parts.length ? `(${parts.join(", ")})` : "";
}

// What is typed goes to the server as text, which reads it: numbers stay exact, errors have words.
function typed(option, value) {
  return make("input", {
    type: "text",
    inputmode: { whole: "numeric", number: "decimal" }[option.kind],
    spellcheck: "false",
    autocomplete: "off",
    value: value ?? "",
    placeholder: option.default ?? "none",
  });
}

const inputs = {
  flag: (option, value) => make("input", { type: "checkbox", checked: value === true }),
  lines: (option, value) => {
    const area = make("textarea", { rows: 2, spellcheck: "false", placeholder: "none" });
    area.value = (value ?? []).join("\n");
    return area;
  },
  choice: (option, value) =>
    make(
      "select",
      {},
      ...option.choices.map((choice, index) =>
        make(
          "option",
          { value: index, selected: JSON.stringify(choice) === JSON.stringify(value) },
          choice === null ? "none" : typeof choice === "string" ? choice : JSON.stringify(choice),
        ),
      ),
    ),
};

const read = {
  flag: (input) => input.checked,
  lines: (input) => {
    const lines = input.value.split("\n").map((line) => line.trim()).filter(Boolean);
    return lines.length ? lines : null;
  },
  choice: (input, option) => option.choices[+input.value],
};

function readText(input, option) {
  return input.value === "" ? option.default : input.value;
}
