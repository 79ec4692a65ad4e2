"""Draw a model as a tree: one line per module with its parameters and deltas, also in colours."""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._backbone.counting import statistics
from .._layers.base import Acts, DeltaLayer
from .._sites.stack import Stack
from ..errors import OptionError, printable

if TYPE_CHECKING:  # rich is imported where something is drawn: it takes a tenth of the start
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.segment import Segment
    from rich.tree import Tree


Note = tuple[str, str]  # a piece of a line: text, style
NAME, FOLDED, TYPE, MARK = "white", "red", "green", "yellow"
OWNED = ("in place of", MARK)  # drawn with the name of the module above
PARAMETER = {  # {(belongs to a delta, trains): style}
    (False, True): "blue",
    (False, False): "grey50",
    (True, True): "magenta",
    (True, False): "dim magenta",
}
COLOURS = {  # {style: colour in SVG and HTML}
    "white": "#f0f0f0",
    "red": "#ff5f5f",
    "green": "#5fc85f",
    "yellow": "#e1be50",
    "blue": "#5fa5ff",
    "grey50": "#8c8c8c",
    "magenta": "#f57df5",
    "dim magenta": "#a05aa0",
}
BACK, FRONT = "#121212", "#a5a5a5"
FONT = "Menlo, 'DejaVu Sans Mono', Consolas, 'Liberation Mono', monospace"
HTML = f"""\
<pre style="background: {BACK}; color: {FRONT}; font-family: {FONT}; line-height: 1.2; \
padding: 1em; white-space: pre; overflow-x: auto">{{lines}}</pre>
"""
WIDE = 1_000_000  # columns: no line is longer
CELL, LINE, MARGIN = 8.45, 17, 12  # pixels of an SVG whose letters have the size 14
SVG = f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{{width}}" height="{{height}}" \
viewBox="0 0 {{width}} {{height}}">
<rect width="{{width}}" height="{{height}}" rx="6" fill="{BACK}"/>
<g font-family="{FONT}" font-size="14" fill="{FRONT}">
{{lines}}
</g>
</svg>
"""


def escaped(text: str) -> str:
    """Return a text as HTML and SVG take it."""
    from html import escape  # a hundredth of the start

    return escape(text)


@dataclass
class Node:
    """One line of the tree, and the lines beneath it.

    Attributes:
        names: the names of the siblings that this line stands for.
        type: the name of their class.
        notes: (text, style) of each mark and parameter behind the type.
        children: the lines beneath.
        look: a number that is equal for siblings that differ in their names only.
        delta: the lines are of a delta, and of no module of the model.
    """

    names: list[str]
    type: str
    notes: list[Note]
    children: list[Node]
    look: int
    delta: bool = False


class Walk:
    """One walk over a model, bottom up, in which equal subtrees get equal numbers.

    Args:
        keep_non_params: keep modules without parameters, such as dropout and activations.
        only_numbered: join siblings only if their names are numbers, as those of blocks.
    """

    def __init__(self, keep_non_params: bool, only_numbered: bool = False) -> None:
        self.keep_non_params, self.only_numbered = keep_non_params, only_numbered
        self.looks: dict[Hashable, int] = {}

    def node(
        self, name: str, module: nn.Module, delta: bool = False, marks: Sequence[Note] = ()
    ) -> Node:
        """Return the lines of `module`; `delta` is true if its parameters belong to a delta."""
        own = ((key, p) for key, p in module._parameters.items() if p is not None)
        notes = [*marks, *parameters(own, delta)]
        layers: dict[str, DeltaLayer] = {}
        nodes = []
        for key, child in module._modules.items():
            if isinstance(child, Stack):
                layers = {name: ly for name, ly in child.in_order() if not ly.watches}
            elif child is not None:
                nodes.append(self.node(key, child, delta))
        kept = (n for n in nodes if self.keep_non_params or n.notes or n.children)
        children = fold(kept, self.only_numbered)
        for key, layer in layers.items():
            if layer.acts is Acts.BESIDE:
                notes += beside(key, layer)
            else:
                children.append(self.delta(key, layer))
        beneath = tuple((tuple(child.names), child.look) for child in children)
        look = self.looks.setdefault((type(module), tuple(notes), beneath), len(self.looks))
        return Node([name], type(module).__name__, notes, children, look, delta)

    def delta(self, name: str, layer: DeltaLayer) -> Node:
        """Return the lines of a delta layer that are drawn beneath its module."""
        marks = [(text, MARK) for text in states(layer)]
        if layer.stand_in is not None:
            return self.node(name, layer.stand_in, True, [OWNED, *marks])
        return self.node(name, layer, True, marks)


def parameters(
    named: Iterable[tuple[str, Tensor]], delta: bool, prefix: str = ""
) -> Iterator[Note]:
    """Yield (text, style) of each parameter; `delta` is true if they belong to a delta."""
    for name, parameter in named:
        shape = "[?]" if is_lazy(parameter) else list(parameter.shape)
        yield f"{prefix}{name}:{shape}", PARAMETER[delta, parameter.requires_grad]


def beside(name: str, layer: DeltaLayer) -> Iterator[Note]:
    """Yield (text, style) of each part of a module's line for a delta layer beside the module."""
    prefix = "" if name == layer.record.config.delta_type else f"{name}."
    yield from parameters(layer.named_parameters(), True, prefix)
    for text in states(layer):
        yield f"{name} {text}", MARK


def states(layer: DeltaLayer) -> list[str]:
    """Return the unusual states of a delta layer: what a block combines, its scale if it is not 1,
    and "disabled"."""
    record = layer.record
    scaled = [f"scale {record.scale:g}"] if record.scale != 1 and layer.scales else []
    children = record.config.children
    combines = [f"combines {', '.join(children)}"] if children else []
    return [*combines, *scaled, *([] if record.active else ["disabled"])]


def fold(nodes: Iterable[Node], only_numbered: bool = False) -> list[Node]:
    """Join siblings that look the same to one node at the place of the first."""
    folded: dict[Hashable, Node] = {}
    for node in nodes:
        apart = only_numbered and not node.names[0].isdecimal()
        first = folded.setdefault((node.look, node.names[0] if apart else None), node)
        if first is not node:
            first.names += node.names
    return list(folded.values())


def _as_dict(node: Node) -> dict[str, Any]:
    return {
        "names": node.names,
        "type": node.type,
        "notes": [text for text, _ in node.notes],
        "children": [_as_dict(child) for child in node.children],
    }


def spell(names: Iterable[str]) -> str:
    """Join names to one word: successive numbers become a range, such as "0-3,7,head"."""
    runs: list[list[str]] = []
    for name in names:
        last = runs[-1][-1] if runs else ""
        short = len(last) < 19 and len(name) < 19  # Python reads no number of thousands of digits
        if short and last.isdecimal() and last == str(int(last)) and name == str(int(last) + 1):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ",".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def draw(node: Node, above: str = "") -> Tree:
    """Return the rich tree of `node`; `above` is the name of the module around it."""
    name = spell(node.names)
    parts = [(name, FOLDED if len(node.names) > 1 else NAME)]
    parts += [(f"({node.type})", TYPE)] if above else []
    parts += [(f"in place of {above}", MARK) if note == OWNED else note for note in node.notes]
    from rich.text import Text
    from rich.tree import Tree

    label = Text()
    for text, style in parts:
        label.append(" " if label else "").append(printable(text), style)
    drawn = Tree(label)
    drawn.children = [draw(child, name) for child in node.children]
    return drawn


def coloured(line: Iterable[Segment], tag: Literal["span", "tspan"]) -> str:
    """Return the line in HTML or SVG, with a tag around each piece that has a colour."""
    attribute = 'fill="{}"' if tag == "tspan" else 'style="color: {}"'
    pieces = []
    for text, style, _ in line:
        shown = escaped(text)
        if tag == "tspan":  # an SVG viewer joins successive spaces
            shown = shown.replace(" ", "\u00a0")
        colour = COLOURS.get(str(style))
        pieces.append(f"<{tag} {attribute.format(colour)}>{shown}</{tag}>" if colour else shown)
    return "".join(pieces)


class ModelTree:
    """The tree of a model at the time when `tree` drew it.

    `print` and a prompt show it as plain text; rich and Jupyter show it in colours.
    """

    def __init__(
        self, model: nn.Module, keep_non_params: bool = False, rootname: str = "root"
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self._node = Walk(keep_non_params).node(rootname, model)
        self._tree = draw(self._node)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A console that may not wrap gets whole lines; any other console cuts long lines.
        if options.no_wrap:
            options = options.update(width=WIDE, justify=None)
        yield from console.render(self._tree, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement.get(console, options, self._tree)

    def to_dict(self) -> dict[str, Any]:
        """Return the tree for JSON: names, type, notes (parameters and marks), children."""
        return _as_dict(self._node)

    def _lines(self) -> list[list[Segment]]:
        from rich.console import Console

        console = Console(file=io.StringIO())
        return console.render_lines(self._tree, console.options.update(width=WIDE), pad=False)

    def __str__(self) -> str:
        return "\n".join("".join(text for text, *_ in line) for line in self._lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return HTML.format(lines="\n".join(coloured(line, "span") for line in self._lines()))

    def _svg(self) -> str:
        from rich.segment import Segment

        lines = self._lines()
        rows = [
            f'<text x="{MARGIN}" y="{MARGIN + LINE * row + 13}">{coloured(line, "tspan")}</text>'
            for row, line in enumerate(lines)
        ]
        return SVG.format(
            width=round(max(map(Segment.get_line_length, lines)) * CELL + 2 * MARGIN),
            height=len(lines) * LINE + 2 * MARGIN,
            lines="\n".join(rows),
        )

    def show(self) -> None:
        """Print the tree without cutting or wrapping lines, in colours if the output has them."""
        from rich.console import Console

        console = Console(soft_wrap=True)
        if console.is_jupyter:
            from IPython.display import display

            display(self)
        else:
            console.print(self)


@overload
def tree(model: nn.Module, to: None = None) -> ModelTree: ...


@overload
def tree(model: nn.Module, to: Literal["text", "svg", "html"]) -> str: ...
@overload
def tree(model: nn.Module, to: str | None) -> ModelTree | str: ...


def tree(model: nn.Module, to: str | None = None) -> ModelTree | str:
    """Draw the modules of `model` with their parameters and deltas.

    Names are white, types green. Parameters that train are blue, frozen ones grey; parameters of
    deltas are magenta. A red name stands for several modules that are alike.

    Args:
        to: "text", "svg" or "html": return a string. None: return an object that `print`, a prompt,
            rich and Jupyter show.

    Raises:
        OptionError: `to` is something else, or `model` is no module.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> delta = opendelta.LoraModel(model, modified_modules=["3"], lora_r=1)
        >>> print(opendelta.tree(model))
        root
        ├── 0,2 (Linear) weight:[8, 8] bias:[8]
        └── 3 (Linear) weight:[2, 8] bias:[2] lora_A:[1, 8] lora_B:[2, 1]
    """
    if to not in (None, "text", "svg", "html"):
        raise OptionError(f"to={to!r} must be 'text', 'svg', 'html' or None")
    drawn = ModelTree(model)
    if to == "text":
        return str(drawn)
    if to == "svg":
        return drawn._svg()
    return drawn._repr_html_() if to == "html" else drawn


class Visualization:
    """The tree of a model under the name that it had in OpenDelta 0.3.

    Example:
        >>> from torch import nn
        >>> from opendelta import Visualization
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> Visualization(model).structure_graph(keep_non_params=True)
        root
        ├── 0 (Linear) weight:[2, 2] bias:[2]
        └── 1 (ReLU)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def structure_graph(
        self,
        rootname: str = "root",
        expand_params: bool = False,
        keep_non_params: bool = False,
        common_structure: bool = False,
        mapping: None = None,
        only_common: bool = False,
        printTree: bool = True,
    ) -> ModelTree | None:
        """Print the tree.

        Args:
            rootname: the name of the model in the first line.
            keep_non_params: show modules without parameters too, such as dropout and activations.
            expand_params: OpenDelta 0.3 had it; not available.
            common_structure: OpenDelta 0.3 had it; not available.
            mapping: OpenDelta 0.3 had it; not available.
            only_common: OpenDelta 0.3 had it; not available.
            printTree: if False, print nothing and return the tree.

        Raises:
            OptionError: the model is no torch module, or an argument is not available.
        """
        if expand_params or common_structure or mapping or only_common:
            raise OptionError(
                "structure_graph draws each parameter in the line of its module, under the model's "
                "own names; opendelta.roles(model) gives the common ones"
            )
        drawn = ModelTree(self.model, keep_non_params, rootname)
        if not printTree:
            return drawn
        drawn.show()
        return None


def log(
    model: nn.Module,
    delta_ratio: bool = True,
    trainable_ratio: bool = True,
    visualization: bool = True,
    cuda_memory: bool = True,
) -> None:
    """Print the tree of `model`, the shares of its parameters, and GPU memory; see `Delta.log`.

    Raises:
        OptionError: `model` is no module.

    Example:
        >>> from torch import nn
        >>> from opendelta._show.tree import log
        >>> log(nn.Linear(2, 2), visualization=False, cuda_memory=False)
        Trainable Ratio: 100.000000%
        Delta Parameter Ratio: 0.000000%
    """
    drawn, counts = ModelTree(model), statistics(model)
    if visualization:
        drawn.show()
    if trainable_ratio:
        print(f"Trainable Ratio: {counts.trainable_ratio * 100:.6f}%")
    if delta_ratio:
        print(f"Delta Parameter Ratio: {counts.delta_ratio * 100:.6f}%")
    if cuda_memory and torch.cuda.is_available():
        static, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        print(f"Static Memory {static / 2**30:.2f} GB, Max Memory {most / 2**30:.2f} GB")
