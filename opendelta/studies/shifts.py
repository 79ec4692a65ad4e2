"""Measure how far each delta moves the outputs of modules, token by token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._backbone.backbone import Backbone
from .._modules.calls import changed_in
from .._modules.kinds import kind_of
from ..errors import SiteError, quoted


class Shifts:
    """How far each delta moves the outputs of the modules that carry deltas.

    For each batch, `plain` notes the outputs without deltas, and `moved_by` compares others with
    them. A module that runs several times in a forward is compared run by run.

    Args:
        not_compared: gets the outputs that cannot be compared, each with the reason.
    """

    def __init__(self, backbone: Backbone, not_compared: list[str]) -> None:
        self.backbone, self.not_compared = backbone, not_compared
        self.outputs: dict[str, list[Tensor]] = {}
        self.masks: dict[str, Tensor] = {}
        self.sums: dict[tuple[str, str], list[float]] = {}
        self.failed: dict[tuple[str, str], str] = {}

    @contextlib.contextmanager
    def plain(self, batch: Any) -> Iterator[None]:
        """Keep the outputs of a run on a batch without deltas."""
        self.outputs, self.masks = {}, _masks(batch)

        def keep(where: str, output: Any) -> None:
            # A copy, as the model may go on in place.
            self.outputs.setdefault(where, []).append(changed_in(output).detach().clone())

        with self._hooks(keep):
            yield

    @contextlib.contextmanager
    def moved_by(self, name: str) -> Iterator[None]:
        """Compare the outputs of a run with those without deltas."""
        runs = dict.fromkeys(self.outputs, 0)

        def compare(where: str, output: Any) -> None:
            number = runs.get(where, 0)
            runs[where] = number + 1
            plain = self.outputs.get(where, ())
            if number >= len(plain):
                self.failed[name, where] = "the module runs more often with the delta"
            else:
                self._add(name, where, changed_in(output), plain[number])

        with self._hooks(compare):
            yield
        for where, count in runs.items():
            if count < len(self.outputs[where]):
                self.failed[name, where] = "the module runs less often with the delta"

    @contextlib.contextmanager
    def _hooks(self, take: Callable[[str, Any], None]) -> Iterator[None]:
        """Call `take(full name of a module, its output)` for each run of a module with deltas."""
        with contextlib.ExitStack() as hooks:
            for where in self.backbone.stacks:

                def hook(_module: Any, _args: Any, output: Any, where: str = where) -> None:
                    # An output without hidden states is not compared.
                    with contextlib.suppress(SiteError):
                        take(where, output)

                handle = self.backbone.modules[where].register_forward_hook(hook)
                hooks.callback(handle.remove)
            yield

    def _add(self, name: str, where: str, output: Tensor, plain: Tensor) -> None:
        if output.shape != plain.shape:
            was, now = list(plain.shape), list(output.shape)
            self.failed[name, where] = f"the output is {now} with the delta, {was} without"
            return
        kind = kind_of(self.backbone.modules[where])
        axis = -1 if kind is None or kind.axis >= output.ndim else kind.axis
        wide = torch.promote_types(plain.dtype, torch.float32)
        sums = self.sums.setdefault((name, where), [0.0, 0.0])
        for index, tensor in enumerate((output.to(wide) - plain.to(wide), plain.to(wide))):
            norms = torch.linalg.vector_norm(tensor, dim=axis)
            sums[index] += float(self._counted(norms, where).sum())

    def _counted(self, norms: Tensor, where: str) -> Tensor:
        """Return the norms of the tokens that are no padding."""
        mask = self.masks.get(self._side(where))
        if mask is None or norms.shape not in (mask.shape, (mask.numel(),)):
            return norms
        return norms * mask.reshape(norms.shape).to(norms.device).bool()

    def _side(self, where: str) -> str:
        """Return the name of the mask for a module: a decoder beside an encoder has its own."""
        two = getattr(getattr(self.backbone.model, "config", None), "is_encoder_decoder", False)
        return DECODERS if two and "decoder" in where.split(".") else MASK

    def result(self, names: list[str]) -> dict[str, dict[str, float]]:
        """Return {name of a delta: {full name of a module: how far its output moves}}."""
        for (name, where), why in self.failed.items():
            self.not_compared.append(f"the outputs of {quoted(where)} with {name}: {why}")
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for (name, where), (moved, size) in self.sums.items():
            if (name, where) not in self.failed and size > 0:
                found[name][where] = moved / size
        return found


MASK, DECODERS = "attention_mask", "decoder_attention_mask"


def _masks(batch: Any) -> dict[str, Tensor]:
    """Return the masks [batch, length] of padding in a batch by name."""
    given = batch if isinstance(batch, Mapping) else {}
    found = {key: given[key] for key in (MASK, DECODERS) if isinstance(given.get(key), Tensor)}
    return {key: mask for key, mask in found.items() if mask.ndim == 2}
