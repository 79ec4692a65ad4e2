"""Answer the questions of the page about one model, with the library's own rules and plans."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .._backbone import roles
from .._backbone.backbone import Backbone
from .._backbone.inputs import Samples
from .._backbone.patterns import select_modules
from .._deltas.choosing import choose
from .._deltas.misfits import why_not
from .._deltas.options import DeltaConfig
from .._deltas.registry import method
from .._show.explaining import explain
from .._show.tables import size
from .._verbs import plan_report
from .._verbs.plan_report import Plan, PlannedDelta
from .._verbs.planning import Planner, known_roles
from ..errors import AddressError, DeltaError, OptionError, shown
from ..names import unnumbered
from . import writing
from .forms import config_of, filled, forms
from .outline import outline

MOST = 6  # roles in an answer to a search

Body = dict[str, Any]
Planned = tuple[Planner, list[Body], list[DeltaConfig]]


class Desk:
    """The answers about one model; nothing of the model is changed.

    Args:
        model: the backbone.
        start: the deltas that the page shows first.
        only: the page has one delta, whose method stays.
        samples: inputs of the model, to find sizes by.
        called: the words for MODEL and its class on the command line.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Sequence[DeltaConfig],
        only: bool = False,
        samples: Samples | None = None,
        called: Sequence[str] = (),
    ) -> None:
        self.start, self.only, self.sampled = start, only, samples is not None
        self.backbone = Backbone.of(model, samples)
        self.roles = known_roles(self.backbone)  # found once: each `bare` shares them
        self.writer = writing.Writer(self.backbone, self.roles)
        self.called = called or _called(model)
        self.planned: dict[str, Planned] = {}  # the last plan, by the deltas it is of
        self.reasons: dict[str, str | None] = {}
        self.verbs: dict[str, Callable[[Body], Body]] = {
            "open": self.open, "search": self.search, "alike": self.alike, "fits": self.fits,
            "plan": self.plan, "explain": self.explain,
        }  # fmt: skip

    def answer(self, verb: str, body: Body) -> Body:
        """Answer a question.

        Raises:
            DeltaError: the question is of another form, or cannot be answered.
        """
        if verb not in self.verbs:
            raise DeltaError(f"the page asks for {verb!r}, which is none of {list(self.verbs)}")
        try:
            return self.verbs[verb](body)
        except (KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DeltaError):
                raise
            raise DeltaError(f"{verb}: the question has another form: {error!r}") from error

    def open(self, body: Body) -> Body:
        """Return all that the page shows at first."""
        model = self.backbone.model
        return {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in self.backbone.model.parameters()),
            "tree": outline(self.backbone, self.roles),
            "methods": forms(),
            "deltas": [self._shown(config) for config in self.start],
            "only": self.only,
            "carries": [record.name for record in self.backbone.records()],
        }

    def search(self, body: Body) -> Body:
        """Return each way in which a text can be taken, with the modules that it selects."""
        text = str(body["text"])
        ways: list[Body] = []
        reason = ""
        known = list(dict.fromkeys(self.roles.values()))
        for role in dict.fromkeys([text, *[r for r in known if r.startswith(text)][:MOST]]):
            try:
                names = roles.with_roles(self.backbone, [role])
            except AddressError:
                continue
            ways.append({"how": "role", "place": role, "names": names})
        part = rf"[r][^.]*{re.escape(text)}[^.]*"
        for how, pattern in (("name", text), ("part of a name", part)):
            if text.startswith("[r]"):
                how = "pattern"
            try:
                names = select_modules(self.backbone, [pattern])
            except AddressError as error:
                reason = reason or str(error)
                continue
            ways.append({"how": how, "place": pattern, "names": names})
            if how == "pattern":
                break
        fresh: dict[str, Body] = {}
        for way in ways:
            fresh.setdefault(json.dumps([way["how"] == "role", way["names"]]), way)
        return {"ways": list(fresh.values()), "reason": "" if ways else reason}

    def alike(self, body: Body) -> Body:
        """Return the modules named as some others in other blocks, of their class, that fit."""
        modules = self.backbone.modules
        self._check(body["names"])
        looks = {(unnumbered(name), type(modules[name]).__name__) for name in body["names"]}
        names = [n for n, m in modules.items() if (unnumbered(n), type(m).__name__) in looks]
        reasons = self.fits({**body, "names": names})["reasons"]
        return {"names": [name for name in names if reasons[name] is None]}

    def fits(self, body: Body) -> Body:
        """Return {full name: why the delta cannot go on the module, or None} for some modules."""
        config = self._config({**body["delta"], "places": None})
        asked = json.dumps(config.to_dict())
        found = {}
        self._check(body["names"])
        for name in body["names"]:
            key = f"{asked} {name}"
            if key not in self.reasons:
                cls = method(config.delta_type)
                self.reasons[key] = why_not(self.backbone, cls, config, name)
            found[name] = self.reasons[key]
        return {"reasons": found}

    def plan(self, body: Body) -> Body:
        """Return the plan of all deltas on the page, and the lines that do the same."""
        planner, told, configs = self._planned(body)
        plan = planner.plan()
        return {
            "deltas": told,
            "figures": _figures(plan),
            "costs": list(plan_report.costs(plan)),
            **self.texts(configs),
        }

    def explain(self, body: Body) -> Body:
        """Return the formula of a module with the deltas on the page."""
        planner, _, _ = self._planned(body)
        told = explain(planner.backbone, body["name"])
        return {"module": told.module, "formula": told.formula, "steps": told.steps}

    def texts(self, configs: list[DeltaConfig]) -> dict[str, str]:
        """Return the lines of Python and the words of the command line for these configs."""
        return {
            "python": writing.python(configs, self.sampled),
            "words": writing.words(self.backbone, self.called, configs),
        }

    def configs(self, body: Body) -> list[DeltaConfig]:
        """Return the configs of all deltas on the page, in order.

        Raises:
            DeltaError: there is none, or one is wrong.
        """
        deltas = _deltas(body)
        if not deltas:
            raise OptionError("there is no delta on the page: add one, or cancel")
        configs = [self._config(wanted) for wanted in deltas]
        own = self.start[0].delta_type if self.only else ""
        if self.only and [config.delta_type for config in configs] != [own]:
            raise OptionError(f"this page is for one delta, of the method {own!r}")
        return configs

    def _planned(self, body: Body) -> Planned:
        """Plan the deltas in a question, unless the last question had the same."""
        deltas = _deltas(body)
        asked = json.dumps(deltas)
        if asked not in self.planned:
            planner, told, configs = Planner(self.backbone.bare()), [], []
            for wanted in deltas:
                try:
                    config = self._config(wanted)
                    told.append(_told(planner.add(config)))
                    configs.append(config)
                except DeltaError as error:
                    told.append({"error": str(error)})
            self.planned = {asked: (planner, told, configs)}
        return self.planned[asked]

    def _config(self, wanted: Body) -> DeltaConfig:
        """Return the config of a delta on the page: {"type": ..., "options": ..., "places": ...}.

        Its places are full names; None: the method's default places.
        """
        found, places = method(wanted["type"]), wanted["places"]
        config = config_of(found.config_class, wanted["options"])
        if places is None:
            return config
        self._check(places)
        if not places:
            raise OptionError(
                "no module is selected: select some in the tree, or take the default places"
            )
        if found.layer_for(config).paired and len(places) % 2:
            raise DeltaError(f"{wanted['type']!r} takes pairs of modules: one has no end")
        return self.writer.config(config, places)

    def _check(self, names: Sequence[Any]) -> None:
        """Raise unless each is the full name of a module."""
        for name in names:
            if not isinstance(name, str) or name not in self.backbone.modules:
                raise DeltaError(f"there is no module {shown(name)}")

    def _shown(self, config: DeltaConfig) -> Body:
        """Return a delta for the page, with full names in the place of patterns and roles."""
        places = None
        if (config.modified_modules, config.exclude_modules) != (None, None):
            cls = method(config.delta_type)
            config = choose(self.backbone, cls, config).config
            places = config.modified_modules
        return {"type": config.delta_type, "options": filled(config), "places": places}


def _deltas(body: Body) -> list[Body]:
    """Return the deltas in a question.

    Raises:
        DeltaError: they are of another form.
    """
    deltas = body.get("deltas")
    for delta in deltas if isinstance(deltas, list) else [None]:
        match delta:
            case {"type": str(), "options": dict(), "places": None | list()}:
                continue
        raise DeltaError(
            f"deltas must be a list of {{type, options, places}}, not {shown(delta or deltas)}"
        )
    return deltas or []


def _told(planned: PlannedDelta) -> Body:
    return {
        "name": planned.name,
        "places": planned.options["modified_modules"],
        "modules": len(planned.modules),
        "parameters": planned.parameters,
        "remarks": list(plan_report.remarks(planned)),
    }


def _called(model: nn.Module) -> list[str]:
    """Return the words for MODEL, and for its class if the command would make another."""
    name, cls = str(getattr(model, "name_or_path", "")), type(model)
    saved = getattr(getattr(model, "config", None), "architectures", None) or ()
    if not name:
        return ["MODEL"]
    return [name] if cls.__name__ in saved else [name, "--class", cls.__name__]


def _figures(plan: Plan) -> list[Body]:
    """Return the costs of a plan in short: a label, a figure and a note for each."""
    flops = plan.flops
    per_token = "not known" if flops is None else f"{flops.per_token:,}"
    return [
        {"label": "Parameters", "figure": f"{plan.added_parameters:,}",
         "note": f"{plan.trainable_share:.3%} train once the backbone is frozen"},
        {"label": "Memory to train", "figure": size(plan.memory.total),
         "note": "values, gradients and optimizer; activations come on top"},
        {"label": "FLOPs per token", "figure": per_token, "note": "added to a forward"},
    ]  # fmt: skip
