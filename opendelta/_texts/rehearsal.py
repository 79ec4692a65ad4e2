"""Run a model that no table knows on a few tokens, to see what it makes of them.

The run changes nothing of the model. Where it fails, nothing is known.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.calls import every, hidden
from .._modules.devices import device_and_dtype
from .._modules.faking import Restoring
from .._modules.kept import around_copies
from .._modules.process import eager, ignored_warnings, kept_random, seed_all
from .._modules.tensors import is_plain, is_sharded, lasting
from .._modules.trials import at_rest

ROWS, LENGTH = 2, 6
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # 16 bits: 5e-2


def is_own(module: nn.Module) -> bool:
    """True if a module's forward is not one of transformers', which the tables know."""
    forward: Any = getattr(type(module), "forward", None)  # TorchScript's class has none
    forward = inspect.unwrap(forward)
    return not (getattr(forward, "__module__", None) or "").startswith("transformers")


def embeds(module: nn.Module, name: str, scale: float) -> bool | None:
    """True if a module computes the same of token ids and of their embeddings by its child `name`.

    None: it does not run on ids alone, or on embeddings alone.

    Args:
        scale: the factor of the embeddings that the module applies to ids alone.
    """

    def runs(made: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
        yield {"input_ids": ids.clone()}
        yield {"inputs_embeds": made.get_submodule(name)(ids) * scale}

    of_ids, of_embeddings = _outputs(module, runs) or (None, None)
    if not of_ids or not of_embeddings or len(of_ids) != len(of_embeddings):
        return None
    return all(map(_near, of_ids, of_embeddings))


def is_relative(module: nn.Module) -> bool | None:
    """True if position ids matter to a module by their distances alone; None: it does not show.

    So it is where queries and keys are turned by them.
    """

    def runs(made: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
        places = torch.arange(LENGTH, device=ids.device).expand(ROWS, -1)
        for moved in (places, places + 1, places + (places > 2)):
            yield {"input_ids": ids, "position_ids": moved}

    return _moves_alone(*(_outputs(module, runs) or [[]] * 3))


def hidden_id(module: nn.Module) -> int | None:
    """Return the token id that a module takes for padding where a call has no mask; or None."""

    def runs(made: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
        ids = _with(ids, token)
        mask = (ids != token).long()
        yield {"input_ids": ids}
        yield {"input_ids": ids, "attention_mask": mask}
        yield {"input_ids": ids, "attention_mask": torch.ones_like(mask)}

    for token in sorted(special_ids(module)):
        if _moves_alone(*(_outputs(module, runs) or [[]] * 3)):
            return token
    return None


def ignored_id(module: nn.Module) -> int | None:
    """Return the token id that a module without a mask hides from all other tokens; or None.

    Other values in its row of the table change no other token's output, or none that is of a whole
    row; those of a plain id do. It is tried behind the tokens and before them.
    """
    own = inspect.signature(type(module).forward).parameters.values()
    needed = [p.name for p in [*own][1:] if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    for argument in (["input_ids"] if "input_ids" in needed else needed) or [[*own][1].name]:
        others = [name for name in needed if name != argument]
        ends, texts = (True, False), (False, True)[: 1 + bool(others)]
        for token, *how in itertools.product(sorted(special_ids(module)), ends, texts):
            if _is_ignored(module, argument, others, token, *how):
                return token
    return None


def _is_ignored(
    module: nn.Module, argument: str, others: list[str], token: int, at_end: bool, texts: bool
) -> bool:
    """True if a module hides a token id, at one end of a row, from all other tokens.

    Args:
        argument: the name of the token ids.
        others: the names of what else it is given.
        texts: the others are texts, too; else one id for each row.
    """
    hides = slice(-2, None) if at_end else slice(2)

    def runs(made: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
        tables, more = (
            _tables_of_ids(made),
            {name: (ids if texts else ids[:, 3]).clone() for name in others},
        )
        for each in (token, int(ids[1, 2])):
            given = ids.clone()
            given[0, hides] = each
            yield {argument: given, **more}
            for table in tables(given):
                weight = table.weight.detach().clone()
                weight[each] = weight[each].flip(0) * 3 + 1
                table._parameters["weight"] = nn.Parameter(weight, False)
            yield {argument: given, **more}

    def seen(outputs: list[Tensor]) -> list[Tensor]:
        whole = [out for out in outputs if out.size(0) == ROWS]
        return [out[0, 2:-2] if out.shape[:2] == (ROWS, LENGTH) else out[0] for out in whole]

    found = [seen(run) for run in _outputs(module, runs)]
    if not found or len({*map(len, found)}) > 1 or not found[0]:
        return False
    hidden, plain = _distance(*found[:2]), _distance(*found[2:])
    return hidden <= _least(found[0]) < plain


def _tables_of_ids(made: nn.Module) -> Callable[[Tensor], list[nn.Embedding]]:
    """Return a function that gives the embeddings in a module which some ids went through last."""
    seen: dict[nn.Embedding, Any] = {}

    def look(part: nn.Module, args: tuple, _: Any) -> None:
        seen[part] = args[0] if args else None  # type: ignore[index]

    for part in made.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(look)
    return lambda ids: [
        part for part, given in seen.items() if given is not None and torch.equal(given, ids)
    ]


def other_ids(module: nn.Module, name: str, scale: float) -> list[int]:
    """Return the token ids that may be padding and are more to a module than their embeddings.

    The arguments are those of `embeds`.
    """
    found = []
    for token in sorted(special_ids(module)):

        def runs(made: nn.Module, ids: Tensor, token: int = token) -> Iterator[dict[str, Any]]:
            for each in (_with(ids, token), ids):
                yield {"input_ids": each}
                yield {"inputs_embeds": made.get_submodule(name)(each) * scale}

        ids, embedded, plain, of_plain = _outputs(module, runs) or [[]] * 4
        if ids and not len(ids) == len(embedded) == len(plain) == len(of_plain):
            continue
        if _distance(ids, embedded) > 10 * _distance(plain, of_plain) + _least(ids):
            found.append(token)
    return found


def _with(ids: Tensor, token: int) -> Tensor:
    """Return ids with one token at both ends of the first row."""
    ids = ids.clone()
    ids[0, :2] = ids[0, -1] = token
    return ids


def _least(outputs: list[Tensor]) -> float:
    """Return by how much outputs may differ that are the same but for rounding."""
    return sum(1e-6 * float(out.double().norm()) for out in outputs)


def counts_distances(module: nn.Module, prepare: Callable[[nn.Module], None]) -> bool | None:
    """True if padding before the tokens changes nothing, and padding among them does.

    None: it does not show. So it is where queries and keys are turned, or biased, by numbers that a
    module makes itself.

    Args:
        prepare: is given the copy of the module that runs.
    """

    def runs(made: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
        prepare(made)
        ids = ids[:, :4]
        for padding in (4, 0, 2):  # behind the tokens, before them, among them
            order = [*range(4)]
            order[padding:padding] = [-1, -1]
            mask = torch.tensor([[int(place >= 0) for place in order]] * ROWS, device=ids.device)
            yield {"input_ids": ids[:, order], "attention_mask": mask}

    def tokens(outputs: list[Tensor], first: int, second: int) -> list[Tensor]:
        rows = [out for out in outputs if out.ndim > 2 and out.shape[:2] == (ROWS, LENGTH)]
        return [torch.cat([o[:, first : first + 2], o[:, second : second + 2]], 1) for o in rows]

    behind, before, among = _outputs(module, runs) or [[]] * 3
    return _moves_alone(tokens(behind, 0, 2), tokens(before, 2, 4), tokens(among, 0, 4))


def _moves_alone(plain: list[Tensor], moved: list[Tensor], spread: list[Tensor]) -> bool | None:
    """True if `spread` is another result than `plain`, and `moved` is the same; None: unclear."""
    if not plain or not len(plain) == len(moved) == len(spread):
        return None
    off, differs = _distance(plain, moved), _distance(plain, spread)
    if off < differs / 10 or not differs:
        return bool(differs)
    return False if all(out.dtype in TOLERANCE for out in plain) else None


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5


@lasting()
def is_by_position(module: nn.Module, name: str) -> bool | None:
    """True if a module reads a row of its parameter `name` [..., rows, width] for each position.

    None: it does not run on token ids alone, or reads the parameter where no gradients flow.
    """
    table = module.get_parameter(name)
    if not is_plain(table) or not table.is_floating_point() or table.size(-2) < 2:
        return None
    where, _, key = name.rpartition(".")
    counts = min(table.size(-2), LENGTH), min(table.size(-2), LENGTH) - 1
    copies: list[Tensor] = []

    def runs(made: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
        own: Any = made.get_submodule(where)._parameters
        for count in counts:
            copies.append(nn.Parameter(table.detach().clone()))
            own[key] = copies[-1]
            yield {"input_ids": ids[:, :count]}
        own[key] = nn.Parameter(torch.full_like(table, torch.nan))
        yield {"input_ids": ids[:, : counts[0]]}

    *outputs, lost = _outputs(module, runs, gradients=True) or ([], [], [])
    if not lost:
        return None
    if not any(out.isnan().any() for out in lost):
        return False
    read = [_rows_read(out, copy) for out, copy in zip(outputs, copies[-2:], strict=True)]
    return (*read,) == counts if all(read) else None


@torch.enable_grad()
def _rows_read(outputs: list[Tensor], table: Tensor) -> int:
    """Return how many rows of `table` the outputs depend on."""
    weighed = [
        (out.flatten() * torch.linspace(1, 2, out.numel(), device=out.device)).sum()
        for out in outputs if out.requires_grad
    ]  # fmt: skip
    (grads,) = torch.autograd.grad(weighed, table, allow_unused=True) if weighed else (None,)
    return 0 if grads is None else int(grads.reshape(-1, *grads.shape[-2:]).any(0).any(-1).sum())


Runs = Callable[[nn.Module, Tensor], Iterator[dict[str, Any]]]


@lasting()
def _outputs(module: nn.Module, runs: Runs, gradients: bool = False) -> list[list[Tensor]]:
    """Return the floating tensors of each run's output; []: one failed.

    Args:
        gradients: flow to parameters that `runs` puts into the copy.
    """
    if any(p.is_meta or is_sharded(p) for p in module.parameters()):
        return []
    for ids in some_ids(module):
        with torch.set_grad_enabled(gradients), leaving_nothing(module):
            try:
                return _run(module, ids, runs)
            except Exception:  # whatever a forward of somebody's own raises on such an input
                continue
    return []


@contextlib.contextmanager
def leaving_nothing(module: nn.Module) -> Iterator[None]:
    """Run a module as it was written inside, and put back what its code changes in the process."""
    with eager(), kept_random(), ignored_warnings(), Restoring(), around_copies(module.modules()):
        yield


def some_ids(module: nn.Module) -> Iterator[Tensor]:
    """Yield ids [rows, length] for the tables of a module, the largest first, but for padding.

    The largest may be one of positions, or of another vocabulary.
    """
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    padding = special_ids(module)
    device, _ = device_and_dtype([module])
    for size in sorted({table.num_embeddings for table in tables}, reverse=True):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
        chosen = [i for i in order if i not in padding]
        if chosen:
            ids = torch.tensor((chosen * ROWS * LENGTH)[: ROWS * LENGTH], device=device)
            yield ids.view(ROWS, LENGTH)


def special_ids(module: nn.Module) -> set[int]:
    """Return the token ids that a module may take for padding."""
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    found = {getattr(getattr(module, "config", None), "pad_token_id", None)}
    found |= {table.padding_idx for table in tables}
    found |= {v for k, v in vars(module).items() if k.startswith("pad")}
    return {0} | {i for i in found if type(i) is int and i >= 0}


def _run(module: nn.Module, ids: Tensor, runs: Runs) -> list[list[Tensor]]:
    made = at_rest(module)
    forward = type(made).forward
    mask = inspect.signature(forward).parameters.get("attention_mask")
    more = {"attention_mask": torch.ones_like(ids)} if mask and mask.default is mask.empty else {}
    todo, outputs = runs(made, ids), []
    with drawing_alike(made) as again:
        while again() and (given := next(todo, None)) is not None:
            outputs.append(forward(made, **{**more, **given}))
    return [
        [t for t in every(Tensor, out, objects=True) if t.is_floating_point() and t.ndim > 1]
        for out in outputs
    ]


@contextlib.contextmanager
def drawing_alike(made: nn.Module) -> Iterator[Callable[[], bool]]:
    """Yield a function after which the same random numbers are drawn as after its last call.

    Inside `kept_random`. It returns true. A generator that a module holds is left as it was.
    """
    held = [g for part in made.modules() for g in vars(part).values() if _is_generator(g)]
    states = [generator.get_state() for generator in held]

    def again() -> bool:
        seed_all()
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)
        return True

    try:
        yield again
    finally:
        again()


@contextlib.contextmanager
def watched(module: nn.Module, sites: Sequence[str]) -> Iterator[Callable[..., Any]]:
    """Yield a function that runs a module like `module` and returns what came out.

    Given the arguments of a call, it returns ({full name: what a site gave first}, the output).
    """
    made = at_rest(module)
    seen = dict[str, Tensor]()

    def look(name: str, _: nn.Module, args: tuple, out: Any) -> None:
        seen.setdefault(name, hidden(out))

    for name in sites:
        made.get_submodule(name).register_forward_hook(functools.partial(look, name))
    with drawing_alike(made) as again:

        def run(args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
            seen.clear()
            again()
            out = type(made).forward(made, *args, **kwargs)
            return dict(seen), out

        yield run


def _is_generator(value: Any) -> bool:
    return isinstance(value, torch.Generator)


def differ(one: Tensor, other: Tensor) -> bool:
    """True if results that should be equal are not."""
    return not _near(one, other)


def _near(one: Tensor, other: Tensor) -> bool:
    most = TOLERANCE.get(one.dtype, 5e-2)
    return one.shape == other.shape and bool(
        (one.float() - other.float()).norm() <= most * other.float().norm()
    )
