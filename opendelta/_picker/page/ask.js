// Ask the server: questions by POST, and one stream that tells how the session ended.

export async function ask(verb, body = {}) {
  let reply;
  try {
    reply = await fetch(verb, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    return { error: "opendelta does not answer: has the session ended?" };
  }
  return reply.json();
}

// Call `over` with "submitted", "cancelled" or "lost" when the session has ended.
export function watch(over) {
  const stream = new EventSource("events");
  let failures = 0;
  stream.onopen = () => (failures = 0);
  stream.addEventListener("end", (event) => {
    stream.close();
    over(JSON.parse(event.data));
  });
  stream.onerror = () => {
    failures += 1;
    if (stream.readyState === EventSource.CLOSED || failures > 1) {
      stream.close();
      over("lost");
    }
  };
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
