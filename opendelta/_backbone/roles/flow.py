"""Find the flow of data through one block: run its forward on stand-ins in place of tensors.

Nothing is computed: a stand-in accepts any operation and records it. The result is a graph. Its
nodes are the operations and the modules with weights; the forward of a module around them is run.
The block itself is never called or changed. Skeletons of its modules run in its place; a skeleton
has all attributes of its module but the weights.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..._modules.calls import every, has_forward
from ..._modules.copies import copied
from ..._modules.faking import Restoring
from ..._modules.kept import around_copies
from ..._modules.kinds import ACROSS_CHANNELS, Norm, kind_of
from ..._modules.process import ignored_warnings, kept_random
from ..._sites.swap import plain_class
from ...names import SLOT, computes_weight, join
from . import choices

LIMIT = 40_000  # steps of one run; a longer run is a loop that does not end on stand-ins
SIZES = re.compile(r"size|dim|numel|stride|new_.*|(?:zeros|ones|empty|full|rand|randn)_like")
LIKE = {"type_as", "to", "view_as", "expand_as", "reshape_as"}  # their arguments are no inputs
FACTORIES = ("empty", "ones", "rand", "randn", "zeros")  # that take sizes one by one
_PATCHED = threading.RLock()


class Node:
    """One step of a run.

    Attributes:
        op: "input", "call" of a module with weights, or the name of an operation.
        name: the name of the called module, relative to the block, or of the input.
        inputs: the steps whose results this step takes, in order.
        outputs: the steps that take the result of this step.
        number: the number of the step.
    """

    __slots__ = ("inputs", "name", "number", "op", "outputs")

    def __init__(self, op: str, name: str, inputs: list[Node], number: int) -> None:
        self.op, self.name, self.inputs, self.number = op, name, inputs, number
        self.outputs: list[Node] = []
        for node in inputs:
            node.outputs.append(self)


class Flow:
    """The graph of one run of a block.

    Attributes:
        nodes: all steps.
        calls: {name of a module, relative to the block: the steps that call it}.
        outputs: the steps whose values the block returns.
        first: the name of the block's first input.
        failure: why the run ended early, or "".
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.calls: dict[str, list[Node]] = {}
        self.outputs: set[Node] = set()
        self.first = ""
        self.failure = ""

    def step(self, op: str, name: str, given: Any) -> Value:
        """Add a step that takes all stand-ins in `given`; return the stand-in of its result."""
        if len(self.nodes) > LIMIT:
            raise TooLong
        node = Node(
            op, name, list(dict.fromkeys(v.node for v in every(Value, given))), len(self.nodes)
        )
        self.nodes.append(node)
        if op == "call":
            self.calls.setdefault(name, []).append(node)
        return Value(self, node)

    def place(self, name: str) -> int:
        """Return the number of the step that first calls the named module."""
        return self.calls[name][0].number

    def reaches_output(self, node: Node) -> bool:
        """True if the block returns the result of `node` without passing it through a module."""
        after = walk(node, outputs, lambda n: n.op != "call")
        return bool({node, *(n for n in after if n.op != "call")} & self.outputs)


def inputs(node: Node) -> list[Node]:
    """Return the steps whose results a step takes."""
    return node.inputs


def outputs(node: Node) -> list[Node]:
    """Return the steps that take the result of a step."""
    return node.outputs


def walk(
    start: Node, following: Callable[[Node], list[Node]], through: Callable[[Node], bool]
) -> Iterator[Node]:
    """Yield each step that `following` leads to from `start`; go on where `through` is true.

    Args:
        following: `inputs` or `outputs`.
    """
    seen, todo = {start}, [start]
    while todo:
        for node in following(todo.pop()):
            if node not in seen:
                seen.add(node)
                yield node
                if through(node):
                    todo.append(node)


def downstream(node: Node, through: Callable[[Node], bool]) -> Iterator[Node]:
    """Yield the nearest steps after `node` for which `through` is false."""
    return (each for each in walk(node, outputs, through) if not through(each))


def upstream(node: Node, through: Callable[[Node], bool]) -> Iterator[Node]:
    """Yield the nearest steps before `node` for which `through` is false."""
    return (each for each in walk(node, inputs, through) if not through(each))


class TooLong(Exception):
    """The run takes more than LIMIT steps."""


@functools.lru_cache(maxsize=1024)
def _unpackings(code: CodeType) -> dict[int, int]:
    """Return {offset in the bytecode: number of names that a value is unpacked into there}."""
    return {
        step.offset: (step.argval if step.opname == "UNPACK_SEQUENCE" else step.arg & 255) + (
            step.opname == "UNPACK_EX"
        )
        for step in dis.get_instructions(code)
        if step.opname in ("UNPACK_SEQUENCE", "UNPACK_EX") and step.arg is not None
    }  # fmt: skip


def _unpacked(frame: FrameType | None) -> int:
    """Return how many names the next unpacking has, in the code that runs in `frame` or around it.

    So many items has `q, k, v = map(heads, qkv)`, which iterates over `qkv` first; 2 if nothing is
    unpacked.
    """
    while frame is not None and frame.f_code.co_filename != __file__:
        for offset, count in _unpackings(frame.f_code).items():
            if offset >= frame.f_lasti:
                return count
        frame = frame.f_back
    return 2


def _pieces(name: str, args: tuple, kwargs: dict[str, Any]) -> int:
    """Return in how many pieces an operation cuts a tensor; 0 if its arguments do not say."""
    if name == "chunk":
        number = kwargs.get("chunks", *args[:1])
        return number if isinstance(number, int) else 0
    sizes = (*args, *kwargs.values()) if name == "split" else ()
    return next((len(each) for each in sizes if isinstance(each, list | tuple)), 0)


class Value:
    """A stand-in for a tensor, for a number made from a tensor, or for a collection of them."""

    def __init__(self, flow: Flow, node: Node, attribute: str = "") -> None:
        self.flow, self.node, self.attribute = flow, node, attribute
        self.truth, self.pieces = False, 0

    def op(self, name: str, *given: Any) -> Value:
        """Return the result of an operation on this stand-in and `given`."""
        return self.flow.step(name, "", (self, *given))

    def true(self) -> Value:
        """Make `bool` of this stand-in true, and return it."""
        self.truth = True
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = next(every(Value, (args, kwargs or {})))
        name = getattr(function, "__name__", "op")
        given = () if SIZES.fullmatch(name) else (args, kwargs or {})
        result = found.flow.step(name, "", given)
        result.pieces = _pieces(name, args[1:], kwargs or {})
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "dtype":
            return torch.float32
        if name == "device":
            return torch.device("meta")
        if name.startswith("is_") or name in ("requires_grad", "training"):
            return False
        if name in ("shape", "ndim"):
            return self.flow.step(name, "", ())
        return Value(self.flow, self.node, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        if self.attribute.startswith("is_"):
            return self
        if SIZES.fullmatch(self.attribute):
            return self.flow.step(self.attribute, "", ())
        if self.attribute in LIKE:
            return self.op(self.attribute)
        result = self.op(self.attribute or "call_value", args, kwargs)
        result.pieces = _pieces(self.attribute, args, kwargs)
        if self.attribute.endswith("_") and not self.attribute.endswith("__"):
            self.node = result.node
        return result

    def __iter__(self) -> Iterator[Value]:
        count = self.pieces or _unpacked(sys._getframe(1))
        return iter([self.op("item") for _ in range(count)])

    def __getitem__(self, key: Any) -> Value:
        return self.op("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.node = self.op("setitem", value).node

    def __len__(self) -> int:
        return self.pieces or 2

    def __contains__(self, item: Any) -> bool:
        return False

    def __index__(self) -> int:
        return 2

    def __int__(self) -> int:
        return 2

    def __float__(self) -> float:
        return 2.0

    def __bool__(self) -> bool:
        return self.truth

    def __eq__(self, other: Any) -> Any:  # suppose that sizes are equal, and none is 0 or 1
        result = self.op("eq", other)
        return result.true() if not isinstance(other, int) or other > 1 else result

    def __ne__(self, other: Any) -> Any:
        return self.op("ne", other)

    def __gt__(self, other: Any) -> Value:  # suppose that sizes are above 0
        result = self.op("gt", other)
        return result.true() if isinstance(other, int) and other == 0 else result

    def __lt__(self, other: Any) -> Value:
        return self.op("lt", other)

    def __hash__(self) -> int:
        return id(self)


def _operators() -> None:
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or"):
        setattr(Value, f"__{name}__", lambda self, other, n=name: self.op(n, other))
        setattr(Value, f"__r{name}__", lambda self, other, n=name: self.op(n, other))
        setattr(Value, f"__i{name}__", lambda self, other, n=name: self.op(n, other))
    for name in ("le", "ge"):
        setattr(Value, f"__{name}__", lambda self, other, n=name: self.op(n, other).true())
    for name in ("neg", "invert", "abs", "pos"):
        setattr(Value, f"__{name}__", lambda self, n=name: self.op(n))


_operators()
# ---------------------------------------------------------------------- skeletons
_cache: Any = functools.cache  # Any: its annotation allows no class of a module as argument


def is_node(module: nn.Module) -> bool:
    """True if a module with weights is one step, so that its own forward is not run."""
    kind = kind_of(module)
    if kind is not None or isinstance(module, nn.MultiheadAttention):
        return True
    inside = (child for key, child in module._modules.items() if child is not None and key != SLOT)
    if any(True for child in inside for _ in child.parameters()):
        return False
    return is_norm(module) or _axes(module) > 1


def _axes(module: nn.Module) -> int:
    own = module._parameters.values()
    return max((p.ndim for p in own if p is not None and not is_lazy(p)), default=0)


def holds_many(module: nn.Module) -> bool:
    """True if a module has a stack of matrices as a parameter, such as fused experts."""
    return _axes(module) > 2


def is_norm(module: nn.Module) -> bool:
    """True if a module is a normalisation of hidden states, by its type."""
    named = "norm" in type(module).__name__.lower() and not isinstance(module, ACROSS_CHANNELS)
    return isinstance(kind_of(module), Norm) or (named and not len(module._modules))


@_cache
def _skeleton_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `base` whose calls become steps of a flow."""
    simple = base.__module__.startswith(("torch.nn", "transformers.activations"))

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        flow, name, node = self.__dict__["_opendelta_flow"]
        if node:
            return flow.step("call", name, (args, kwargs))
        if not has_forward(self) or (simple and not self._modules):
            return flow.step(base.__name__, name, (args, kwargs))
        try:
            return base.forward(self, *args, **kwargs)
        except TooLong:
            raise
        except Exception:  # its code may do anything with a stand-in that is no tensor
            return flow.step("call", name, (args, kwargs))

    meta: Any = type(base)
    return meta(base.__name__, (base,), {"__call__": __call__, "__module__": base.__module__})


def _skeleton(module: nn.Module, name: str, flow: Flow, seen: dict[int, Any]) -> Any:
    """Return an object that runs the forward of `module` on stand-ins."""
    if id(module) in seen:
        return seen[id(module)]
    base = plain_class(module) or type(module)
    if isinstance(module, torch.jit.ScriptModule):  # compiled: its forward cannot run on stand-ins
        base, module = nn.Module, nn.Module()
    copy: Any = object.__new__(_skeleton_class(base))
    seen[id(module)] = copy
    for key, value in module.__dict__.items():  # a forward may write into containers: copy them
        copy.__dict__[key] = value.copy() if type(value) in (dict, list, set) else value
    copy.__dict__.pop("forward", None)
    copy.__dict__["_opendelta_flow"] = flow, name, is_node(module)
    for table in ("_parameters", "_buffers"):
        copy.__dict__[table] = {
            key: None if tensor is None else flow.step("weight", join(name, key), ())
            for key, tensor in module.__dict__[table].items()
        }
    copy.__dict__["_modules"] = {
        key: None if child is None else _skeleton(child, join(name, key), flow, seen)
        for key, child in module._modules.items()
        if key != SLOT
    }
    return copy


def trace(block: nn.Module) -> list[Flow]:
    """Return the flows of data through `block`, for one choice of arguments after another.

    It stops at the first run that ends and calls each normalisation. Runs that ended come first.
    The state of the random number generators stays as it was, and so does what the modules hold and
    what their code keeps elsewhere.
    """
    flows = []
    made = copied(block, layers=False) or block
    for choose in (choices.likely, choices.needed, choices.every_one):
        flow = Flow()
        kept = around_copies(made.modules())
        with kept_random(), ignored_warnings(), Restoring(), kept, _taking_sizes():
            try:
                flow.outputs = _run(made, flow, choose)
            except Exception as error:  # code may do anything with stand-ins
                flow.failure = f"{type(error).__name__}: {error}"
        flows.append(flow)
        if not flow.failure and _has_all(flow, made):
            break
    return sorted(flows, key=lambda flow: bool(flow.failure))


@contextlib.contextmanager
def _taking_sizes() -> Iterator[None]:
    """Let `torch.ones(n, n)` and the like take stand-ins for sizes, as `torch.ones((n, n))` does.

    Torch looks at the first size before it asks a stand-in. For all others they are as they were.
    """

    def taking(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            several = len(args) > 1 and any(isinstance(each, Value) for each in args)
            return make(args, **kwargs) if several else make(*args, **kwargs)

        return made

    with _PATCHED:
        own = {name: getattr(torch, name) for name in FACTORIES}
        try:
            for name, make in own.items():
                setattr(torch, name, taking(make))
            yield
        finally:
            for name, make in own.items():
                setattr(torch, name, make)


def _has_all(flow: Flow, block: nn.Module) -> bool:
    norms = (n for n, m in block.named_modules() if is_norm(m) and not computes_weight(n))
    return all(name in flow.calls for name in norms)


def _run(block: nn.Module, flow: Flow, choose: Callable[..., bool]) -> set[Node]:
    root = _skeleton(block, "", flow, {})
    forward = (plain_class(block) or type(block)).forward
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for number, parameter in enumerate(list(inspect.signature(forward).parameters.values())[1:]):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        flow.first = flow.first or parameter.name
        if choose(parameter, number == 0):
            value: Any = flow.step("input", parameter.name, ())
        elif parameter.default is parameter.empty:
            value = None
        else:
            value = parameter.default
        if parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(value)
        else:
            kwargs[parameter.name] = value
    return {value.node for value in every(Value, forward(root, *args, **kwargs))}
