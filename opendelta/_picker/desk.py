"""Answer the questions of the page about one model, with the library's own rules and plans."""

from __future__ import annotations

import dataclasses
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
from .._verbs.plan_report import Plan
from .._verbs.planning import Planner, known_roles
from ..errors import AddressError, DeltaError, OptionError
from ..names import unnumbered
from . import writing
from .forms import BY_TREE, forms
from .outline import outline

MOST = 6  # roles in an answer to a search

Body = dict[str, Any]


class Desk:
    """The answers about one model; nothing of the model is changed.

    Args:
        model: the backbone.
        start: the deltas that the page shows first.
        only: the page has one delta, whose method stays.
        samples: inputs of the model, to find sizes by.
        called: the word for MODEL in words of the command line.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Sequence[DeltaConfig],
        only: bool = False,
        samples: Samples | None = None,
        called: str = "",
    ) -> None:
        self.start, self.only = start, only
        self.backbone = Backbone.of(model, samples)
        self.roles = known_roles(self.backbone)  # found once: each `bare` shares them
        self.planner = Planner(self.backbone.bare())
        self.writer = writing.Writer(self.backbone, self.roles)
        self.called = called or str(getattr(model, "name_or_path", "") or "MODEL")
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
        """Return the modules that have the same names as some modules in other blocks."""
        looks = {unnumbered(name) for name in body["names"]}
        return {"names": [n for n in self.backbone.modules if unnumbered(n) in looks]}

    def fits(self, body: Body) -> Body:
        """Return {full name: why the delta cannot go on the module, or None} for some modules."""
        config = self._config({**body["delta"], "places": None})
        asked = json.dumps(config.to_dict())
        found = {}
        for name in body["names"]:
            if name not in self.backbone.modules:
                raise DeltaError(f"there is no module {name!r}")
            key = f"{asked} {name}"
            if key not in self.reasons:
                cls = method(config.delta_type)
                self.reasons[key] = why_not(self.backbone, cls, config, name)
            found[name] = self.reasons[key]
        return {"reasons": found}

    def plan(self, body: Body) -> Body:
        """Return the plan of all deltas on the page, and the lines that do the same."""
        self.planner = Planner(self.backbone.bare())
        told: list[Body] = []
        configs: list[DeltaConfig] = []
        for wanted in body["deltas"]:
            try:
                config = self._config(wanted)
                planned = self.planner.add(config)
            except DeltaError as error:
                told.append({"error": str(error)})
                continue
            configs.append(config)
            chosen = planned.options["modified_modules"]
            told.append({
                "name": planned.name,
                "places": chosen,
                "modules": len(planned.modules),
                "parameters": planned.parameters,
                "remarks": list(plan_report.remarks(planned)),
            })  # fmt: skip
        plan = self.planner.plan()
        return {
            "deltas": told,
            "figures": _figures(plan),
            "costs": list(plan_report.costs(plan)),
            "python": writing.python(configs),
            "words": writing.words(self.backbone, self.called, configs) if configs else "",
        }

    def explain(self, body: Body) -> Body:
        """Return the formula of a module with the deltas of the last plan."""
        told = explain(self.planner.backbone, body["name"])
        return {"module": told.module, "formula": told.formula, "steps": told.steps}

    def configs(self, body: Body) -> list[DeltaConfig]:
        """Return the configs of all deltas on the page, in order.

        Raises:
            DeltaError: there is none, or one is wrong.
        """
        if not body["deltas"]:
            raise OptionError("there is no delta on the page: add one, or cancel")
        return [self._config(wanted) for wanted in body["deltas"]]

    def _config(self, wanted: Body) -> DeltaConfig:
        """Return the config of a delta on the page: {"type": ..., "options": ..., "places": ...}.

        Its places are full names; None: the method's default places.
        """
        config_class = method(wanted["type"]).config_class
        config = config_class.from_dict(wanted["options"])
        places = wanted["places"]
        if places is None:
            return config
        for name in places:
            if name not in self.backbone.modules:
                raise DeltaError(f"there is no module {name!r}")
        return self.writer.config(config, places)

    def _shown(self, config: DeltaConfig) -> Body:
        """Return a delta for the page, with full names in the place of patterns and roles."""
        places = None
        if (config.modified_modules, config.exclude_modules) != (None, None):
            cls = method(config.delta_type)
            config = choose(self.backbone, cls, config).config
            places = config.modified_modules
        given = dataclasses.asdict(config)
        options = {name: value for name, value in given.items() if name not in BY_TREE}
        return {"type": config.delta_type, "options": options, "places": places}


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
