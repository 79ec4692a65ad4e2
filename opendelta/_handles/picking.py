"""`pick`: attach the deltas that a user picks on a local page."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .._backbone.inputs import Samples
from .._deltas.options import DeltaConfig
from .._deltas.registry import method
from .._verbs.planning import as_configs
from .auto import AutoDeltaModel
from .delta import Delta


def pick(
    model: nn.Module,
    configs: DeltaConfig | Sequence[DeltaConfig] | None = None,
    *,
    browser: bool = True,
    port: int = 0,
    sample_inputs: Samples | None = None,
) -> list[Delta]:
    """Open a local page on which you pick modules, methods and options; attach what is picked.

    The page is served on this machine alone, at an address with a secret in it, which is printed.
    It shows the plan of what is picked, and the lines of Python that do the same. The call returns
    when the page submits, cancels or is closed, or at Ctrl-C.

    Args:
        model: the backbone; it may be on the meta device.
        configs: the deltas that the page shows first. None: a LoRA at its default places.
        browser: open the page in a browser. False: only print the address.
        port: the port of the page; 0: any free port.
        sample_inputs: inputs of the model, to find sizes by; see `Delta`.

    Returns:
        The new deltas in their order. It is empty if picking was cancelled.

    Raises:
        OptionError: an argument is of another kind.
        DeltaError: the port is taken, or `configs` do not fit the model.

    Example:
        >>> import opendelta
        >>> deltas = opendelta.pick(model)  # doctest: +SKIP
        opendelta: pick at http://127.0.0.1:40123/8W7p.../ (Ctrl-C cancels)
    """
    from .._picker import session  # start-up: it imports http.server

    start = as_configs("pick", method("lora").config_class() if configs is None else configs)
    made: list[Delta] = []

    def attach(picked: list[DeltaConfig]) -> None:
        made.clear()
        try:
            for config in picked:
                new = AutoDeltaModel.from_config(config, model, sample_inputs=sample_inputs)
                made.append(new)
        except BaseException:
            for delta in reversed(made):
                delta.detach()
            raise

    picked = session.pick(model, start, attach, port=port, browser=browser, samples=sample_inputs)
    return [] if picked is None else made
