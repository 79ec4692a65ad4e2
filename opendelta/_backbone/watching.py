"""Watch a run on shapes: which modules are called, and which parameters other code reads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .._modules import trials
from .._modules.calls import map_tensors
from .._modules.devices import device_and_dtype
from .._modules.faking import Shapes, on_shapes
from .._modules.tensors import memory_of
from .._sites.stack import stack_of
from ..errors import SiteError
from ..names import last, parent
from . import inputs, shapes
from .apart import apart
from .backbone import Backbone
from .branches import Branches

# torch's own, which compute what calls of the modules around would.
FAST = (
    torch.ops.aten._transformer_encoder_layer_fwd.default,
    torch.ops.aten._native_multi_head_attention.default,
)


class Watch(TorchDispatchMode):
    """Notes which of some modules are called, and whose weight or bias others compute with.

    Shapes, dtypes, devices and views are no values, so that looking at them is not noted.

    Attributes:
        branches: the code of somebody's own that ran.
        called: the names of the modules that were called.
        read: (name of a module, "weight" or "bias") of the values that were read outside of the
            module's own forward.

    Args:
        modules: {name: module}.
        around: the modules around these, which may do something else in training, or in evaluation.
    """

    def __init__(self, modules: Mapping[str, nn.Module], around: Iterable[nn.Module]) -> None:
        super().__init__()
        self.modules, self.around, self.called = modules, list(around), set[str]()
        self.read: set[tuple[str, str]] = set()
        self.running: list[str] = []
        self.owned: dict[tuple[str, str], int] = {}
        self.owners: dict[int, tuple[str, str]] = {}
        self.views: list[Tensor] = []
        self.branches = Branches()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        tensors = [value for value in tree_iter((args, given)) if isinstance(value, Tensor)]
        owners = {self.owners[memory_of(t)] for t in tensors if memory_of(t) in self.owners}
        output = func(*args, **given)
        if func.is_view:
            for view in [t for t in tree_iter(output) if isinstance(t, Tensor) and owners]:
                self.owners[memory_of(view)] = next(iter(owners))
                self.views.append(view)  # else its memory may become another tensor's
        elif not _makes_like(func) and func not in FAST:
            self.read |= {owner for owner in owners if owner[0] not in self.running}
        return output

    def has_seen_all(self) -> bool:
        """True if each module was called or read."""
        return all(map(self.has_seen, self.modules))

    def has_seen(self, name: str) -> bool:
        """True if a module was called or read."""
        return name in self.called or any(name == read for read, _ in self.read)

    def plant(self, root: nn.Module) -> None:
        """Watch the next call of `root`, by attributes of instances; the caller takes them off."""
        for name, module in self.modules.items():
            module.__dict__["forward"] = self._noting(name, module.forward)
        stacks = {n: s for n, m in self.modules.items() if (s := stack_of(m)) is not None}
        inner = root._call_impl  # the forward and its hooks

        def call(*args: Any, **kwargs: Any) -> Any:
            self.owned = {
                (name, key): memory_of(parameter)
                for name, module in self.modules.items()
                for key, parameter in module._parameters.items()
                if parameter is not None and key in ("weight", "bias")
            }
            self.owners = {memory: owner for owner, memory in self.owned.items()}
            for name, stack in stacks.items():  # what a module shows as its weight is no read of it
                stack.__dict__["fold"] = self._noting(name, stack.fold, call=False)
            try:
                with self, self.branches:
                    output = inner(*args, **kwargs)
                    with contextlib.suppress(Exception), self._in_the_other_mode():
                        inner(*args, **kwargs)
                return output
            finally:
                for stack in stacks.values():
                    stack.__dict__.pop("fold", None)

        root.__dict__.update(_call_impl=call, _compiled_call_impl=None)

    @contextlib.contextmanager
    def _in_the_other_mode(self) -> Iterator[None]:
        """Let the modules around be in training if they are in evaluation, and the other way."""
        modes = [module.training for module in self.around]
        try:
            for module, mode in zip(self.around, modes, strict=True):
                module.training = not mode
            yield
        finally:
            for module, mode in zip(self.around, modes, strict=True):
                module.training = mode

    def _lent(self, name: str, key: str) -> bool:
        """True if a module runs with another weight or bias, as in `functional_call`."""
        parameter = self.modules[name]._parameters.get(key)
        return parameter is not None and memory_of(parameter) != self.owned.get((name, key))

    def _noting(
        self, name: str, inner: Callable[..., Any], call: bool = True
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if call:
                self.called.add(name)
                self.read |= {(name, key) for key in ("weight", "bias") if self._lent(name, key)}
            self.running.append(name)
            try:
                return inner(*args, **kwargs)
            finally:
                self.running.pop()

        return forward


def _makes_like(func: Any) -> bool:
    """True if an operation makes a tensor of the same sort, whatever the values are."""
    name = func._schema.name.rpartition("::")[2]
    return name.startswith("new_") or name.endswith("_like")


def of_children(backbone: Backbone, names: list[str]) -> Watch | None:
    """Watch children of one module, while it runs alone or the backbone runs on shapes.

    The backbone comes first if its user gave inputs. None: no run reaches any of them.
    """
    ways = (of_backbone, of_part) if backbone.samples is not None else (of_part, of_backbone)
    watches = (watch for way in ways if (watch := way(backbone, names)) is not None)
    return next((watch for watch in watches if watch.called or watch.read), None)


def of_part(backbone: Backbone, names: list[str]) -> Watch | None:
    """Watch children of one module while it runs alone, on shapes.

    Args:
        names: the full names of the children.

    Returns:
        None: it runs on none of the inputs that are known.
    """
    around = backbone.modules[parent(names[0])]
    for args, kwargs in inputs.of_module(around):
        with torch.no_grad(), on_shapes(around) as mode:
            try:
                made = trials.without_values(around, mode)
                fake = functools.partial(_fake, mode, device_and_dtype([around])[0])
                watch = Watch({name: made.get_submodule(last(name)) for name in names}, [made])
                watch.plant(made)
                args, kwargs = map_tensors(fake, (args, kwargs))
                made(*args, **kwargs)
            except Exception:  # a forward may raise anything
                continue
            return watch
    return None


def _fake(mode: Shapes, device: torch.device, tensor: Tensor) -> Tensor:
    return mode.empty(tensor.shape, tensor.dtype, device)


def of_backbone(backbone: Backbone, names: list[str]) -> Watch | None:
    """Watch modules while the backbone runs on shapes; None: it runs on no known inputs."""
    with apart(backbone) as twin:
        around = {parent(name): twin.modules[parent(name)] for name in names}
        watch = Watch({name: twin.modules[name] for name in names}, around.values())
        try:
            shapes.dry_run(twin, lambda _: None, watch.plant, watch.has_seen_all)
        except SiteError:
            return None
    return watch
