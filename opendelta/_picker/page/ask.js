// Ask the server: questions by POST, and one stream that tells how the session ended.

const PATIENCE = 60_000; // of the server, with a connection that broke
const RETRY = 1_000;

export async function ask(verb, body = {}, more = {}) {
  let reply;
  try {
    reply = await fetch(verb, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      ...more,
    });
  } catch {
    return { error: "opendelta does not answer: has the session ended?" };
  }
  return reply.json();
}

// Call `over` with "submitted", "cancelled" or "lost" when the session has ended.
export function watch(over) {
  addEventListener("pagehide", () => ask("leave", {}, { keepalive: true }));
  if (!globalThis.SharedWorker) return stream(over);
  const worker = new SharedWorker("worker.js", { type: "module" });
  worker.port.onmessage = (event) => over(event.data);
}

export function stream(over) {
  let broken = null; // since when
  const open = () => {
    const events = new EventSource("events");
    events.onopen = () => (broken = null);
    events.addEventListener("end", (event) => {
      events.close();
      over(JSON.parse(event.data));
    });
    events.onerror = () => {
      events.close();
      broken ??= Date.now();
      if (Date.now() - broken > PATIENCE) over("lost");
      else setTimeout(open, RETRY);
    };
  };
  open();
}

// Run `action` once the calls have paused; while one runs, later calls wait for its end.
export function settled(action, pause) {
  let timer = 0;
  let running = false;
  let again = false;
  async function run() {
    if (running) {
      again = true;
      return;
    }
    running = true;
    try {
      await action();
    } finally {
      running = false;
    }
    if (again) {
      again = false;
      run();
    }
  }
  return () => {
    clearTimeout(timer);
    timer = setTimeout(run, pause);
  };
}

// An element that is replaced while the pointer is down on it gets no click: its box is drawn once
// the pointer is up.
let pressed = null;
const late = new Map(); // box: what it shows then
addEventListener("pointerdown", (event) => (pressed = event.target), true);
for (const name of ["pointerup", "pointercancel"])
  addEventListener(
    name,
    () => {
      pressed = null;
      setTimeout(() => [...late].forEach(([box, show]) => late.delete(box) && show()));
    },
    true,
  );

function draw(box, show) {
  late.delete(box);
  if (pressed !== box && box.contains(pressed)) late.set(box, show);
  else show();
}

// Replace what is in a box.
export function replace(box, ...children) {
  draw(box, () => box.replaceChildren(...children));
}

// Replace what is in a box. The focus stays on the part with the same `data-focus`, else it goes to
// what `other` returns.
export function redraw(box, other, ...children) {
  draw(box, () => {
    const held = box.contains(document.activeElement) && document.activeElement.dataset.focus;
    box.replaceChildren(...children);
    if (held) (box.querySelector(`[data-focus="${held}"]:not(:disabled)`) ?? other(held)).focus();
  });
}

// Make an element; texts come from models of others, so they are only ever set as text.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}
