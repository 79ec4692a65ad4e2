"""One session: open the page, answer its questions, and return what it submits."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._backbone.inputs import Samples
from .._deltas.options import DeltaConfig
from ..errors import DeltaError, OptionError, printable, shown
from .desk import Desk
from .server import BEAT, Refused, Server

Job = tuple[str, dict[str, Any], "Future[dict[str, Any]]"]


@dataclass(frozen=True)
class Picked:
    """The result of a session.

    Attributes:
        configs: a config for each delta, in their order.
        python: the lines of Python that do the same.
        words: the words of the command line that plan the same.
    """

    configs: list[DeltaConfig]
    python: str
    words: str


def pick(
    model: nn.Module,
    start: Sequence[DeltaConfig],
    finish: Callable[[list[DeltaConfig]], Any] = lambda configs: None,
    *,
    only: bool = False,
    port: int = 0,
    browser: bool = True,
    samples: Samples | None = None,
    called: Sequence[str] = (),
) -> Picked | None:
    """Open the page, and return what is picked; None if picking is cancelled.

    The model is looked at in the thread of the caller alone. Several pages may be open: each has
    its own picks, and the first that submits ends the session.

    Args:
        start: the deltas that the page shows first.
        finish: called with what the page submits. If it raises, the page shows the error, and the
            session goes on.
        only: the page has one delta, whose method stays.
        port: 0: any free port.
        browser: open a browser. False: only print the address.
        samples: inputs of the model, to find sizes by.
        called: the words for MODEL and its class on the command line.

    Raises:
        OptionError: `model` is none, or `port` is none.
        DeltaError: the port is taken, or the start is wrong.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if type(port) is not int or not 0 <= port < 2**16:
        raise OptionError(f"port={shown(port)} must be a whole number from 0 to {2**16 - 1}")
    desk = Desk(model, start, only, samples, called)
    desk.open({})
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def answer(verb: str, body: dict[str, Any]) -> dict[str, Any]:
        future: Future[dict[str, Any]] = Future()
        if server.ended.is_set():
            raise Refused(410, f"picking has ended: {server.end}")
        jobs.put((verb, body, future))
        return future.result()

    server = Server(answer, port)
    with server, _no_job_left(server, jobs):
        _announce(server.address, browser)
        return _work(desk, jobs, server, finish)


def pick_one(
    model: nn.Module,
    config: DeltaConfig,
    attach: Callable[[DeltaConfig], None],
    samples: Samples | None,
) -> None:
    """Let the page change one config, and attach the delta; for `interactive_modify`.

    Raises:
        DeltaError: picking was cancelled.
    """
    asked = config.interactive_modify
    if config.modified_modules is not None:
        raise OptionError(
            f"{type(config).__name__}: interactive_modify={asked!r} lets you pick the modules, and "
            f"modified_modules={shown(config.modified_modules)} names them: give one of the two. "
            "opendelta.pick(model, config) opens a page that starts with the modules of a config"
        )
    start = dataclasses.replace(config, interactive_modify=False)
    port = 0 if asked is True else int(asked)
    finish: Any = lambda configs: attach(configs[0])  # noqa: E731
    if pick(model, [start], finish, only=True, port=port, samples=samples) is None:
        raise DeltaError("picking was cancelled (interactive_modify), so nothing is attached")


def _work(
    desk: Desk,
    jobs: queue.SimpleQueue[Job],
    server: Server,
    finish: Callable[[list[DeltaConfig]], Any],
) -> Picked | None:
    """Answer the pages until one submits or cancels, or all are closed, or Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        while not server.is_alone():
            try:
                verb, body, future = jobs.get(timeout=BEAT)
            except queue.Empty:
                continue
            if verb == "cancel":
                server.end = "cancelled"
                future.set_result({})
                return None
            try:
                picked = _submitted(desk, body, finish) if verb == "submit" else None
                told = desk.answer(verb, body) if picked is None else {}
            except Exception as error:  # of a method's own code, too
                what = "" if isinstance(error, DeltaError) else f"{type(error).__name__}: "
                future.set_result({"error": printable(f"{what}{error}")})
                continue
            except BaseException:
                future.set_result({"error": "stopped"})
                raise
            if picked is not None:
                server.end = "submitted"
            future.set_result(told)
            if picked is not None:
                return picked
    server.end = "cancelled"
    return None


def _submitted(
    desk: Desk, body: dict[str, Any], finish: Callable[[list[DeltaConfig]], Any]
) -> Picked:
    configs = desk.configs(body)
    texts = desk.texts(configs)
    finish(configs)
    return Picked(configs, **texts)


@contextlib.contextmanager
def _no_job_left(server: Server, jobs: queue.SimpleQueue[Job]) -> Iterator[None]:
    """At the end of a `with` block let no request wait for an answer."""
    try:
        yield
    finally:
        server.ended.set()
        with contextlib.suppress(queue.Empty):
            while True:
                _, _, future = jobs.get_nowait()
                future.set_result({"error": f"picking has ended: {server.end}"})


def _announce(address: str, browser: bool) -> None:
    """Print the address, and open it in a browser that has a window of its own."""
    print(f"opendelta: pick at {address} (Ctrl-C cancels)", file=sys.stderr, flush=True)
    if not browser:
        return
    with contextlib.suppress(webbrowser.Error):
        # A GenericBrowser, such as w3m, takes over the terminal.
        if type(webbrowser.get()) is not webbrowser.GenericBrowser:
            webbrowser.open(address)
