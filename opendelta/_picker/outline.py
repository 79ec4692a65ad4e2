"""The modules of a model as lines for the page, repeated blocks as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.parameter import is_lazy

from .._backbone.backbone import Backbone
from .._modules.kinds import kind_of
from .._show.tree import Node, Walk
from ..names import join


def outline(backbone: Backbone, roles: Mapping[str, str]) -> dict[str, Any]:
    """Return the line of the model: its names, class, kind, sizes, and the lines beneath it."""
    root = Walk(keep_non_params=True, only_numbered=True).node("", backbone.model)
    return _line(backbone, roles, root, "")


def _line(backbone: Backbone, roles: Mapping[str, str], node: Node, where: str) -> dict[str, Any]:
    """Return one line; `where` is the full name of the first module that it stands for."""
    module = backbone.modules[where]
    kind = kind_of(module)
    own = [p for p in module._parameters.values() if p is not None and not is_lazy(p)]
    beneath = [
        _line(backbone, roles, child, join(where, child.names[0]))
        for child in node.children
        if not child.delta
    ]
    stack = backbone.stacks.get(where)
    return {
        "names": node.names,
        "type": node.type,
        "kind": "" if kind is None else kind.name,
        "sizes": [] if kind is None else [kind.in_features, kind.out_features],
        "role": roles.get(where, ""),
        "parameters": sum(p.numel() for p in own)
        + sum(len(line["names"]) * line["parameters"] for line in beneath),
        "carries": [] if stack is None else list(stack),
        "children": beneath,
    }
