"""Default places in all architectures of transformers: a table, docs/reference/architectures.md.

Each model that `AutoModel.from_config` can build is built on the meta device, without weights, from
its default configuration. Its repeated blocks are cut to two of each kind; then its roles are read,
and the default of each of four methods is attached.

Examples:
    python benchmarks/architectures.py
    python benchmarks/architectures.py --only bert,llama --json architectures.json
    python benchmarks/architectures.py --write    # rewrites docs/reference/architectures.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import opendelta
from opendelta._backbone.backbone import Backbone
from opendelta._backbone.roles.blocks import Tree, units
from opendelta.names import ancestors

HERE = Path(__file__).parent
COVERED = HERE / "architectures.txt"
REFUSED = {"ibert"}  # its linears return pairs, which no delta but the adapter takes
PAGE = HERE.parent / "docs" / "reference" / "architectures.md"
METHODS = {
    "LoRA": opendelta.LoraModel,
    "Adapter": opendelta.AdapterModel,
    "IA3": opendelta.IA3Model,
    "BitFit": opendelta.BitFitModel,
}
PROJECTIONS = ("attn.", "cross_attn.", "mixer.")
SECONDS, MEMORY = 120, 12 * 2**30  # limits for one model


@dataclasses.dataclass
class Result:
    """What was found in one architecture.

    Attributes:
        name: its model type.
        unbuilt: why it cannot be built, or "".
        modules: how many modules the whole model has.
        seconds: time to read the roles of the whole model.
        roles: {role: number of modules that play it, in the whole model}.
        methods: {method: blocks that got a layer / blocks that have the role, or why none}.
        complete: {method: whether every block that has the role got a layer}.
    """

    name: str
    unbuilt: str = ""
    modules: int = 0
    seconds: float = 0.0
    roles: dict[str, int] = dataclasses.field(default_factory=dict)
    methods: dict[str, str] = dataclasses.field(default_factory=dict)
    complete: dict[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def readable(self) -> bool:
        """Whether attention or mixer projections were found."""
        return bool(projections(self.roles))


def projections(roles: Iterable[str]) -> set[str]:
    """The roles of the projections of attention and mixers among `roles`."""
    return {r for r in roles if r.startswith(PROJECTIONS) and not r.endswith(".layer_norm")}


def build(name: str) -> nn.Module:
    """The model of that type, of its default configuration, without weights."""
    with torch.device("meta"):
        return transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[name]())


def shorten(model: nn.Module, most: int = 2) -> None:
    """Leave `most` of the items that are built alike in each list of blocks."""
    tree = Tree.of(Backbone.of(model))
    looks: dict[Hashable, int] = {}
    seen: dict[str, int] = {}
    for name, module in tree.backbone.modules.items():
        if not isinstance(module, nn.ModuleList):
            continue
        counts: dict[int, int] = {}
        kept = []
        for key, item in module._modules.items():
            look = tree.look(f"{name}.{key}" if name else key, looks, seen)
            counts[look] = counts.get(look, 0) + 1
            if counts[look] <= most:
                kept.append(item)
        module._modules.clear()
        module._modules.update({str(number): item for number, item in enumerate(kept)})


def study(name: str) -> Result:
    """Build one architecture, read its roles and attach the methods, within the limits."""
    result = Result(name)
    signal.alarm(SECONDS)
    try:
        model = build(name)
    except Exception as error:  # whatever is missing for this one: a package, an option
        reason = (str(error).strip().splitlines() or [""])[0]
        reason = re.sub(r" from '/[^']*'", "", reason)  # where this machine has the file
        result.unbuilt = f"{type(error).__name__}: {reason}"
    else:
        examine(result, model)
    finally:
        signal.alarm(0)
    return result


def examine(result: Result, model: nn.Module) -> None:
    """Read the roles of the whole model, then attach the methods to the shortened one."""
    result.modules = len(list(model.modules()))
    start = time.perf_counter()
    roles = opendelta.roles(model)
    result.seconds = time.perf_counter() - start
    for role in roles.values():
        result.roles[role] = result.roles.get(role, 0) + 1
    shorten(model)
    for title, method in METHODS.items():
        attach(result, title, method, model)


def attach(result: Result, title: str, method: Any, model: nn.Module) -> None:
    """Attach the default of a method, and count the blocks that it reached."""
    wanted = method.default_modified_modules
    having = _blocks(model, places(model, wanted))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", opendelta.DeltaWarning)
            delta = method(model)
    except opendelta.DeltaError as error:
        result.methods[title] = f"n/a: {_reason(model, str(error))}"
        result.complete[title] = not having
        return
    reached = _blocks(model, delta.modified_modules)
    result.methods[title] = f"{len(having & reached)}/{len(having)}"
    result.complete[title] = having <= reached
    delta.detach()


def places(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """The modules with one of the `wanted` roles, or parts of a wanted sublayer."""
    exact = {role for role in wanted if "." in role}
    whole = tuple(f"{role}." for role in wanted if "." not in role)
    fused = {"attn.q": "attn.qkv", "attn.v": "attn.qkv attn.kv", "attn.k": "attn.qkv attn.kv"}
    exact |= {other for role in exact for other in fused.get(role, "").split()}
    roles = opendelta.roles(model)
    linear = {n for n, r in roles.items() if r not in ("ff.experts", "ff.router")}
    return [n for n in linear if roles[n] in exact or (whole and roles[n].startswith(whole))]


def _blocks(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The blocks that hold the named modules."""
    blocks = set(units(Tree.of(Backbone.of(model))))
    around = (next((a for a in ancestors(n) if a in blocks), _item(n)) for n in names)
    return {block for block in around if block}


def _item(name: str) -> str:
    """The item of a list that holds a module of a model whose blocks are spread over lists."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def _reason(model: nn.Module, message: str) -> str:
    if "has the role" not in message:
        return message
    found = projections(opendelta.roles(model).values())
    return "it has no such role" if found else "no attention or mixer projections"


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def _start() -> None:
    signal.signal(signal.SIGALRM, _too_long)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def study_all(names: Iterable[str], workers: int) -> list[Result]:
    """The results for all `names`, in order, from processes of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "torchao", "opendelta"])
    with ProcessPoolExecutor(workers, context, _start) as pool:
        return list(pool.map(study, names))


# ----------------------------------------------------------------------------------- the table
def table(results: Iterable[Result]) -> Table:
    """The results as a table for a terminal."""
    shown = Table(title="blocks that each default reaches, of those that have the role")
    for column in ("architecture", "modules", "ms", *METHODS):
        shown.add_column(column, justify="left" if column == "architecture" else "right")
    for r in results:
        cells = [short(r.methods[title]) for title in METHODS]
        shown.add_row(r.name, str(r.modules), f"{1000 * r.seconds:.0f}", *cells)
    return shown


def short(cell: str) -> str:
    """A reason in a word."""
    return cell.partition(":")[0]


def page(results: list[Result]) -> str:
    """The text of docs/reference/architectures.md."""
    built = [r for r in results if not r.unbuilt]
    read = [r for r in built if r.readable]
    lines = [
        "# Architectures\n",
        f"Of the {len(results)} model types of transformers {transformers.__version__}, "
        f"`AutoModel.from_config` builds {len(built)} from their default configuration. In "
        f"{len(read)} of these `opendelta.roles` finds attention or mixer projections. The table "
        "says in how many blocks, of those that have the role, the default of a method gets a "
        "layer, after the repeated blocks were cut to two of each kind. `make arch` writes this "
        "page.\n",
        "| architecture | roles | " + " | ".join(METHODS) + " |",
        "|---|---|" + "--:|" * len(METHODS),
    ]
    for r in read:
        cells = " | ".join(r.methods[title] for title in METHODS)
        lines.append(f"| {r.name} | {', '.join(sorted(r.roles))} | {cells} |")
    lines += ["\n## Without attention or mixer projections\n"]
    lines += [
        "Convolution nets and codecs mostly, and attention whose weights are convolutions or bare "
        "parameters: a default that finds none of its places is an error that names the blocks and "
        "the nearest modules.\n",
        ", ".join(r.name for r in built if not r.readable) + "\n",
        "## Not built\n",
    ]
    lines += [f"- {r.name}: {r.unbuilt}" for r in results if r.unbuilt]
    return "\n".join(lines) + "\n"


def failures(results: list[Result], covered: set[str]) -> list[str]:
    """What is not as it must be."""
    wrong = []
    for r in results:
        if r.name in covered and not r.readable:
            wrong.append(f"{r.name}: {r.unbuilt or 'no attention or mixer projections found'}")
        wrong += [
            f"{r.name}: {title} reaches {r.methods[title]}"
            for title in METHODS
            if r.name not in REFUSED and not r.complete.get(title, True)
        ]
    return wrong


def main() -> int:
    """Run the study; 1 if an architecture is not covered as it must be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", help="model types, with commas between them")
    parser.add_argument("--workers", type=int, default=2, choices=[1, 2])
    parser.add_argument("--json", type=Path, help="write the results into this file")
    parser.add_argument("--write", action="store_true", help="rewrite the page")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else sorted(MODEL_MAPPING_NAMES)
    start = time.perf_counter()
    results = study_all(names, options.workers)
    console = Console()
    console.print(table(r for r in results if not r.unbuilt))
    built = [r for r in results if not r.unbuilt]
    covered = set(COVERED.read_text(encoding="utf-8").split())
    wrong = failures(results, covered)
    console.print(
        f"{sum(r.readable for r in built)} of {len(built)} read; "
        f"{len(results) - len(built)} not built; {time.perf_counter() - start:.0f} s"
    )
    for line in wrong:
        console.print(f"[red]{line}")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
    if options.write:
        PAGE.write_text(page(results), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
