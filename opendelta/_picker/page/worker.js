// Hold one stream of events for all pages of a session: a browser opens few connections to a host.

import { stream } from "./ask.js";

const ports = [];
let last = null;
stream((how) => {
  last = how;
  for (const port of ports) port.postMessage(how);
});
onconnect = (event) => {
  ports.push(event.ports[0]);
  if (last !== null) event.ports[0].postMessage(last);
};
