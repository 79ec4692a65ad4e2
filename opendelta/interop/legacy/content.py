"""The tensors of OpenDelta 0.3 by their owners, and under our names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._backbone.backbone import Backbone
from ..._modules.tensors import full, stored_params
from ...errors import DeltaLoadError
from ...names import SLOT, ancestors
from .._draft import keys_and_values

METHODS = {
    "lora": "lora",
    "adapter": "adapter",
    "parallel_adapter": "parallel_adapter",
    "low_rank_adapter": "low_rank_adapter",
    "compactor": "compacter",
    "bitfit": "bitfit",
    "prefix": "prefix",
}
OURS = rf"(?:.+\.)?{SLOT}\.(?:.+)"  # the name of a tensor here
# With three layers of one method on a module, the second has _1 behind its name, the third _2.
KEY = re.compile(
    rf"(?!{OURS})(?P<where>.+?)\.(?P<slot>{'|'.join(METHODS)})(?:_(?P<nth>\d+))?\.(?P<rest>.+)"
)
NETWORK = re.compile(r"(?P<owner>(?P<where>.+)\.reparams(?:_\d+)?)\.(?P<rest>.+)")
PROMPT = re.compile(r"(?:.+\.)?soft_prompt_layer\.soft_embeds")
TOKENS = re.compile(r".+\.reparams(?:_\d+)?\.input_tokens")  # the numbers 0, 1, 2, ...
RENAMED = {  # {our method: [(pattern in a 0.3 name, our text instead)]}
    "adapter": [(r"^modulelist\.", "")],
    "parallel_adapter": [(r"^modulelist\.", "")],
    "compacter": [(r"\.(?=phm_rule)", ".rule."), (r"\.(?=W)", ".blocks.")],
}


@dataclass
class Content:
    """The tensors of a state dict of OpenDelta 0.3, sorted by their owners.

    Attributes:
        sites: {(our name of a method, number of earlier layers of it on the same module): {full
            name of a module: {our name of a tensor: values}}}.
        networks: {start of the names of a network that computes prefixes: (the module that held it,
            {the rest of a tensor's name: values})}.
        prompt: the rows of a soft prompt.
        others: the backbone's tensors.
    """

    sites: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    networks: dict[str, tuple[str, dict[str, Tensor]]] = field(default_factory=dict)
    prompt: Tensor | None = None
    others: dict[str, Tensor] = field(default_factory=dict)

    def of(self, method: Any) -> list[dict[str, dict[str, Tensor]]]:
        """Return the sites of a method: of the first layers on their modules, of the second, ..."""
        return [part for (kind, _), part in sorted(self.sites.items()) if kind == method]

    def take_network(self, wanted: Iterable[str]) -> dict[str, Tensor] | None:
        """Take out the network that a module around one of `wanted` held; None if there is none."""
        held_by = {around for where in wanted for around in ancestors(where)}
        owners = (owner for owner, (where, _) in self.networks.items() if where in held_by)
        owner = next(owners, None)
        return None if owner is None else self.networks.pop(owner)[1]


def content_of(given: dict[str, Tensor]) -> Content:
    """Sort a state dict by its keys."""
    content = Content()
    for key, tensor in given.items():
        if PROMPT.fullmatch(key):
            content.prompt = tensor
        elif (found := NETWORK.fullmatch(key)) and "." in found["rest"]:
            network = content.networks.setdefault(found["owner"], (found["where"], {}))
            network[1][found["rest"]] = tensor
        elif found := KEY.fullmatch(key):
            name, rest = METHODS[found["slot"]], found["rest"]
            for pattern, ours in RENAMED.get(name, ()):
                rest = re.sub(pattern, ours, rest)
            content.sites[name, int(found["nth"] or 0)][found["where"]][rest] = tensor
        elif not TOKENS.fullmatch(key):
            content.others[key] = tensor
    return content


def own_names(
    name: str,
    backbone: Backbone,
    content: Content,
    sites: dict[str, dict[str, Tensor]],
    wanted: Iterable[str],
) -> dict[str, dict[str, Tensor]]:
    """Return {full name of a module: {our tensor: values}} for a delta on the modules `wanted`."""
    wanted = list(wanted)
    if name == "soft_prompt" and content.prompt is not None:
        return {wanted[0]: {"soft_embeds": content.prompt}} if wanted else {}
    if name == "bitfit":
        return {where: {"bias": _change(backbone, where, own)} for where, own in sites.items()}
    if name == "prefix" and (network := content.take_network(wanted)) is not None:
        return _prefixes(backbone, network, wanted)
    if name == "prefix":
        around = {n: next(w for w in wanted if f"{w}.".startswith(f"{n}.")) for n in sites}
        return {around[n]: own for n, own in sites.items()}
    return sites


def _change(backbone: Backbone, where: str, own: dict[str, Tensor]) -> Tensor:
    """Return BitFit's change of a module's bias: 0.3 saved the changed bias, not the change."""
    change = own.get("bias", torch.zeros(()))
    if "whole" in own:
        module = backbone.modules.get(where)
        base = stored_params(module).get("bias") if module is not None else None
        whole = own["whole"]
        if base is not None and base.shape == whole.shape and not base.is_meta:
            whole = whole.float() - full(base).detach().cpu().float()
        change = change + whole
    return change


def _prefixes(
    backbone: Backbone, network: dict[str, Tensor], wanted: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Split the network of all prefixes: a shared part, and the rows of its last layer for each."""
    try:
        last = [network.pop(f"control_trans.2.{end}") for end in ("weight", "bias")]
        shared = {
            "tensors.embedding": network.pop("wte.weight"),
            "tensors.hidden.weight": network.pop("control_trans.0.weight"),
            "tensors.hidden.bias": network.pop("control_trans.0.bias"),
        }
        weights, biases = (tensor.chunk(2 * len(wanted)) for tensor in last)
    except (KeyError, RuntimeError) as error:
        raise DeltaLoadError(f"the network of the prefix is not whole: {error}") from None
    own: dict[str, dict[str, Tensor]] = {backbone.innermost_around(wanted): shared}
    for where, tensors in keys_and_values(weights, biases, wanted):
        own.setdefault(where, {}).update(tensors)
    return own
