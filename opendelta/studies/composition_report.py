"""The report of `report`: its data, and the page that shows them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from .._checkpoint.contents import states
from .._files.folder import own_version, replace, writable
from .._files.reading import as_path, read_start, readable
from .._show.data import for_json
from .._show.explaining import Explanation
from .._show.notebooks import as_html
from .._show.tables import folded, size
from .._show.tree import ModelTree
from ..errors import DeltaError, OptionError, printable, shown
from ..names import NUMBER
from .comparison import Comparison
from .norms import Norm

T = TypeVar("T")
NAMES, LONGEST = 8, 160  # names in a row; characters of a name
LABELS = {  # of the facts of a training
    "task": "task", "unit": "score is", "score": "score", "baseline": "largest class alone",
    "train": "examples to learn from", "test": "held-out examples", "deltas": "deltas",
    "rates": "learning rates", "steps": "steps", "seed": "seed", "seconds": "seconds",
    "parameters": "parameters", "share": "share that trained", "where": "where",
}  # fmt: skip
HEIGHT = 40  # of the largest bar, in pixels
GENERATOR = '<meta name="generator" content="opendelta report'
PAGE = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR} {{version}}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}} - opendelta report</title>
<style>{{style}}</style>
</head>
<body>{{body}}</body>
</html>
"""
FRAME = (
    '<iframe sandbox srcdoc="{page}" style="width: 100%; height: 600px; border: 0" '
    'title="report"></iframe>'
)


@dataclass(frozen=True, repr=False)
class CompositionReport:
    """All that is known of a composition; `save(path)` writes it as a page, `to_dict()` gives data.

    Attributes:
        source: the folder as it was given; the class of the model, for a live one.
        format: the library that wrote the folder; "": there is none.
        backbone: the class of the model that the deltas are of; "": not known.
        model: the class of the model that was given; "": there was none.
        parameters: number of parameters of the deltas.
        tensors: number of their tensors.
        bytes: size of the files of the folder; None: there is none.
        deltas: for each delta in the order its name, type, switches, parameters, places, and
            options other than defaults.
        sites: the formula of each module with deltas; [] without a model.
        norms: the size of each layer.
        not_measured: the weight changes that could not be read, each with the reason.
        backbone_check: what the fingerprint of the folder says of the model: "status" is "same",
            "differing" or "not compared", "why" says it in words; "differing", "same" and "unread"
            name the weights. {} without a folder.
        training: the facts that `opendelta train` wrote beside the folder.
        comparison: the comparison that the composition is from; None: there is none.
        tree: the modules with their deltas; None without a model.
    """

    source: str
    format: str
    backbone: str
    model: str
    parameters: int
    tensors: int
    bytes: int | None
    deltas: list[dict[str, Any]]
    sites: list[Explanation]
    norms: list[Norm]
    not_measured: list[str]
    backbone_check: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    comparison: Comparison | None = None
    tree: ModelTree | None = None

    @property
    def html(self) -> str:
        """Return the report as a whole HTML page that loads nothing from elsewhere."""
        return _page(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the page into a file, also in the place of another report.

        Raises:
            OptionError: the name does not end in .html.
            DeltaError: there is a file that is no report, or the place cannot be written.
        """
        to = as_path(path, "path")
        if to.suffix.lower() not in (".html", ".htm"):
            raise OptionError(f"path={shown(str(to))} must end in .html, such as report.html")
        with readable(to):
            other = to.exists() and GENERATOR not in read_start(to).decode("latin-1")
        if other:
            raise DeltaError(f"{to} exists and is no report of opendelta: give another name")
        with writable(to.parent):
            to.parent.mkdir(parents=True, exist_ok=True)
            replace(to, self.html.encode())

    def to_dict(self) -> dict[str, Any]:
        """Return all data of the report for JSON; a number that JSON does not have is null."""
        parts: dict[str, Any] = {
            key: list(map(asdict, getattr(self, key))) for key in ("sites", "norms")
        }
        for key in ("comparison", "tree"):
            parts[key] = getattr(self, key) and getattr(self, key).to_dict()
        return for_json({**vars(self), **parts})

    def _repr_html_(self) -> str:
        return FRAME.format(page=escape(self.html))

    def __repr__(self) -> str:
        names = ", ".join(delta["name"] for delta in self.deltas)
        return printable(f"report on {self.source}: {names}; save(path) writes it as a page")


# ----------------------------------------------------------------------------------------- elements
class Html(str):
    """Text that is HTML already; all other text is escaped."""


def _tag(name: str, *inside: Any, **attributes: str) -> Html:
    """Return an element; `_` at the end of an attribute is left out."""
    given = "".join(f' {key.rstrip("_")}="{_text(text)}"' for key, text in attributes.items())
    return Html(f"<{name}{given}>{''.join(map(_text, inside))}</{name}>")


def _text(value: Any) -> str:
    return value if isinstance(value, Html) else escape(printable(str(value)))


def _short(name: str) -> str:
    return printable(name, LONGEST)


def _row_of(names: list[str]) -> Html:
    """Return names in a row, the first ones of many."""
    rest = [f"and {len(names) - NAMES:,} more"] if len(names) > NAMES else []
    return Html(", ".join(map(_text, [*(_tag("code", _short(n)) for n in names[:NAMES]), *rest])))


def _facts(rows: Iterable[tuple[str, Any]]) -> Html:
    return _tag("dl", *(_tag("div", _tag("dt", key), _tag("dd", value)) for key, value in rows))


def _alike(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Return items in groups of the same key."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


# --------------------------------------------------------------------------------------- the page
def _page(report: CompositionReport) -> str:
    names = [_short(delta["name"]) for delta in report.deltas]
    title = ", ".join(names[:NAMES]) + ", ..." * (len(names) > NAMES)
    from_where = "a live model"
    if report.format:
        from_where = f"{report.format}, saved from {report.backbone or 'an unnamed model'}"
    about = f"{from_where}; {report.parameters:,} parameters in {report.tensors:,} tensors"
    about += "" if report.bytes is None else f"; {size(report.bytes)}"
    tree = [] if report.tree is None else [Html(report.tree._repr_html_())]
    sections = {
        "Deltas, in the order in which they act": [_deltas(report)],
        "Backbone": _backbone(report),
        "What the modules compute": _sites(report.sites),
        "Sizes of the changes": _norms(report),
        "Training": _training(report),
        "Modules": tree,
    }
    body = _tag(
        "main",
        _tag("h1", title),
        _tag("p", _tag("code", report.source)),
        _tag("p", about, class_="quiet"),
        *(_tag("section", _tag("h2", name), *parts) for name, parts in sections.items() if parts),
        _tag("footer", f"Written by opendelta {own_version()}."),
    )
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    return PAGE.format(version=_text(own_version()), title=_text(title), style=style, body=body)


def _deltas(report: CompositionReport) -> Html:
    return _tag("ol", *(_delta(each, report.parameters) for each in report.deltas))


def _delta(delta: dict[str, Any], whole: int) -> Html:
    count = delta["parameters"]
    rows: list[tuple[str, Any]] = [
        ("method", _short(delta["delta_type"])),
        ("parameters", f"{count:,} ({count / max(whole, 1):.1%})"),
    ]
    for label, key in (("on", "modules"), ("own copies of", "modules_to_save")):
        if delta[key]:
            rows.append((label, _row_of(folded(delta[key]))))
    if delta["options"]:
        options = [f"{_short(key)}={shown(value)}" for key, value in delta["options"].items()]
        rows.append(("options", _row_of(options)))
    marks = (_tag("span", state, class_=f"state {state}") for state in states(delta))
    return _tag(
        "li", _tag("h3", _short(delta["name"])), _tag("p", *marks), _facts(rows), class_="panel"
    )


def _backbone(report: CompositionReport) -> list[Html]:
    check = report.backbone_check
    if not check:
        return []
    status, what = check["status"], f"{report.model}: " if report.model else ""
    mark = _tag("span", status, class_=f"state {status.split()[0]}")
    parts = [_tag("p", mark, f"{what}{check['why']}.")]
    if check["differing"]:
        lines = [f"{name} {how}" for name, how in check["differing"].items()]
        parts.append(_tag("p", _row_of(lines)))
    if not report.model:
        more = (
            "With a model this page also shows the tree, the formulas, the sizes of the changes "
            "beside those of the weights, and whether the deltas were trained on these weights: "
        )
        command = _tag("code", f"opendelta report {report.source} MODEL")
        parts.append(_tag("p", more, command, class_="quiet"))
    return parts


def _sites(sites: list[Explanation]) -> list[Html]:
    parts = []
    for own in _alike(sites, lambda each: (each.formula, *each.steps)):
        count = "1 module" if len(own) == 1 else f"{len(own):,} modules"
        steps = [_tag("li", _short(step)) for step in own[0].steps]
        inside = [
            _tag("pre", own[0].formula, class_="formula"),
            _tag("p", _row_of(folded(each.module for each in own)), class_="quiet"),
            _tag("details", _tag("summary", f"{count}, step by step"), _tag("ol", *steps)),
        ]
        parts.append(_tag("div", *inside, class_="panel"))
    return parts


# -------------------------------------------------------------------------------------------- norms
def _norms(report: CompositionReport) -> list[Html]:
    order = {delta["name"]: at for at, delta in enumerate(report.deltas)}
    charts = _alike(report.norms, lambda each: (each.delta, each.of))
    charts.sort(key=lambda own: order.get(own[0].delta, len(order)))
    parts = [_chart(own) for own in charts]
    if report.not_measured:
        parts.append(_tag("p", "Not read: ", _row_of(report.not_measured), class_="quiet"))
    return parts


def _chart(norms: list[Norm]) -> Html:
    """Return the bars of a delta's layers."""
    first = norms[0]
    known = all(each.relative is not None for each in norms)
    about = "norm of the parameters of each layer"
    if first.of == "weight":
        about = "norm of the change dW of each weight W" + ", over that of W" * known
    heights = {each.module: (each.relative or 0) if known else each.norm for each in norms}
    most = max(filter(math.isfinite, heights.values()), default=0)
    groups = []
    for own in _alike(norms, lambda each: NUMBER.sub("#", each.module)):
        names = folded(each.module for each in own)
        ranked = sorted(own, key=lambda each: heights[each.module])
        ends = dict.fromkeys(_value(each) for each in (ranked[0], ranked[-1]))
        count = "1 layer" if len(own) == 1 else f"{len(own):,} layers"
        told = f"{count}: {' to '.join(ends)}"
        rows = [_tag("tr", _tag("td", _short(e.module)), _tag("td", _value(e))) for e in own]
        groups += [
            _tag("p", _row_of(names if len(names) == 1 else [NUMBER.sub("#", own[0].module)])),
            _bars([heights[each.module] for each in own], most, told),
            _tag("details", _tag("summary", told), _tag("table", *rows)),
        ]
    heading = _tag("h3", _short(first.delta) or "tensors", " ", _tag("span", about))
    return _tag("div", heading, *groups, class_="panel chart")


def _value(norm: Norm) -> str:
    """Return a norm in words, also in units of that of the weight."""
    return f"{norm.norm:.3g}" + ("" if norm.relative is None else f" ({norm.relative:.3g} |W|)")


def _bars(heights: list[float], most: float, label: str) -> Html:
    """Return a bar for each layer, side by side in one picture; none for what is no number."""
    tall = [HEIGHT * height / most if most and math.isfinite(height) else 0 for height in heights]
    path = "".join(f"M{i}.1 {HEIGHT}v{-each:.1f}h.8v{each:.1f}" for i, each in enumerate(tall))
    return _tag(
        "svg",
        _tag("path", d=path),
        **{"viewBox": f"0 0 {len(tall)} {HEIGHT}", "preserveAspectRatio": "none"},
        **{"role": "img", "aria-label": label, "style": f"max-width: {len(tall) * 16}px"},
    )


# ----------------------------------------------------------------------------------------- training
def _training(report: CompositionReport) -> list[Html]:
    parts = []
    if report.training:
        rows = [(LABELS[key], _fact(value)) for key, value in report.training.items()]
        parts.append(_tag("div", _facts(rows), class_="panel"))
    if report.comparison is not None:
        parts.append(_tag("div", Html(as_html(report.comparison)), class_="panel"))
    return parts


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_short(name)} {_fact(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_fact, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else _short(str(value))
