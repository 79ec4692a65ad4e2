"""Open a folder of deltas: check its facts and options, and leave its tensors on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import interop
from .._deltas.options import DeltaConfig
from .._deltas.registry import method
from .._files import folder as files
from .._files.reading import undamaged
from .._files.tensors import Stored
from ..errors import DeltaLoadError, OptionError, shown
from ..names import ancestors
from . import fingerprint

MOST_DELTAS = 1_000  # in a folder; more of them would take longer than a second to load


@dataclass(frozen=True)
class Source:
    """The contents of a folder of deltas.

    Attributes:
        facts: the JSON.
        configs: the options of each delta.
        tensors: {full name: tensor}; the tensors of our own files stay on disk.
        verify: raises if the tensors have changed since they were saved.
        has_fingerprint: the folder is ours, and says by what the backbone is known.
    """

    facts: dict[str, Any]
    configs: list[DeltaConfig]
    tensors: Mapping[str, Any]
    verify: Callable[[], None]
    has_fingerprint: bool = True

    @property
    def saved_from(self) -> str | None:
        """Return the class of the model that the deltas were saved from; None if unknown."""
        name = self.facts.get("backbone_class")
        return name if isinstance(name, str) else None

    def other_config(self, model: nn.Module) -> dict[str, tuple[Any, Any]]:
        """Return {setting that differs: (its value in the deltas' model, its value in `model`)}."""
        then, now = self.facts.get("backbone_config"), fingerprint.described(model)
        then = then if isinstance(then, dict) else {}
        both = [key for key in now if key in then]
        return {key: (then[key], now[key]) for key in both if then[key] != now[key]}

    def without(self, absent: Sequence[str], path: Path) -> Source:
        """Return the contents without what is on the modules `absent`, and inside them.

        Raises:
            DeltaLoadError: there is nothing on one of them, or nothing else.
        """
        if not absent:
            return self
        for name in absent:
            if not any(name in ancestors(key) for key in self.tensors):
                raise DeltaLoadError(f"absent={name!r}: {path} holds nothing on a module {name!r}")
        gone = {*absent}

        def rest(values: Any) -> Any:
            if not isinstance(values, list | dict):
                return values
            left = [v for v in values if not (isinstance(v, str) and gone & {*ancestors(v)})]
            return {key: values[key] for key in left} if isinstance(values, dict) else left

        facts, configs = [], []
        for fact, config in zip(self.facts["deltas"], self.configs, strict=True):
            config = dataclasses.replace(config)
            for name in config.option_names():
                setattr(config, name, rest(getattr(config, name)))
            if config.modified_modules or config.modules_to_save:
                facts.append({**fact, "frozen": rest(fact["frozen"])})
                configs.append(config)
        if not facts:
            raise DeltaLoadError(f"{path} holds deltas on {shown(list(absent))} only")
        parts = {key: rest(self.facts[key]) for key in ("fingerprint", "backbone_tensors")}
        tensors = {key: self.tensors[key] for key in rest(list(self.tensors))}
        facts_now = {**self.facts, **parts, "deltas": facts}
        return dataclasses.replace(self, facts=facts_now, configs=configs, tensors=tensors)


@contextlib.contextmanager
def opened(path: Path, model: nn.Module, absent: Sequence[str] = ()) -> Iterator[Source]:
    """Open the folder at `path`, ours or another library's, for deltas on `model`.

    Args:
        absent: modules to leave out; see `Source.without`.

    Raises:
        DeltaLoadError: the folder is damaged, or holds no delta.
    """
    reader = interop.reader_of(path)
    if reader is not None:
        with undamaged(path):
            facts, tensors = reader.translate(path, model)
        facts["fingerprint"] = {}
        theirs = Source(facts, configs_of(path, facts), tensors, lambda: None, False)
        yield theirs.without(absent, path)
        return
    with files.open_folder(path) as (facts, weights, file):
        configs = configs_of(path / files.CONFIG, facts)
        stored = {key: Stored(weights, key) for key in weights.keys()}  # noqa: SIM118
        verify = functools.partial(files.check_digest, path, facts, file)
        yield Source(facts, configs, stored, verify).without(absent, path)


def configs_of(where: Path, facts: dict[str, Any]) -> list[DeltaConfig]:
    """Return the options of the deltas in the JSON of a folder.

    Args:
        where: the file of the JSON, or another library's folder, for messages.

    Raises:
        DeltaLoadError: the JSON describes no possible delta.
    """
    if not _are_names(facts.get("backbone_tensors")):
        raise DeltaLoadError(f"{where}: backbone_tensors must be a list of names")
    if not fingerprint.is_fingerprint(facts.get("fingerprint")):
        raise DeltaLoadError(f"{where}: fingerprint must hold a shape and values of each weight")
    given = facts.get("deltas")
    if not isinstance(given, list) or not given:
        raise DeltaLoadError(f"{where}: deltas must be a list of at least one")
    if len(given) > MOST_DELTAS:
        raise DeltaLoadError(f"{where} holds {len(given):,} deltas, more than {MOST_DELTAS:,}")
    configs = [_config(where, fact) for fact in given]
    names = [fact["name"] for fact in given]
    if len(set(names)) < len(names):
        raise DeltaLoadError(f"{where}: two deltas have the same name: {shown(names)}")
    return configs


FACTS = {"delta_type": str, "name": str, "active": bool, "frozen": list, "options": dict}


def _config(where: Path, fact: Any) -> DeltaConfig:
    if not isinstance(fact, dict) or fact.keys() - {"scale"} != FACTS.keys():
        raise DeltaLoadError(f"{where}: each of deltas must have just {', '.join(FACTS)}")
    for key, kind in FACTS.items():
        if not isinstance(fact[key], kind):
            raise DeltaLoadError(f"{where}: {key}={shown(fact[key])} must be a {kind.__name__}")
    if not isinstance(fact.get("scale", 1.0), float):
        raise DeltaLoadError(f"{where}: scale={shown(fact['scale'])} must be a float")
    if not _are_names(fact["frozen"]):
        raise DeltaLoadError(f"{where}: frozen must be a list of names")
    if pattern := next(_patterns(fact["options"].values()), None):
        raise DeltaLoadError(
            f"{where}: {shown(pattern)} is a pattern, where a saved delta has full names"
        )
    try:
        options = {**fact["options"], "name": fact["name"]}
        config = method(fact["delta_type"]).config_class.from_options(options)
    except OptionError as error:
        raise DeltaLoadError(f"{where}: {error}") from None
    for name, value in options.items():
        if isinstance(value, str) and isinstance(getattr(config, name, None), list):
            raise DeltaLoadError(f"{where}: {name}={shown(value)} must be a list")
    return config


def _patterns(values: Iterable[Any]) -> Iterator[str]:
    """Yield the regular expressions in options. They may run forever, so they are refused."""
    for value in values:
        names = value if isinstance(value, list | dict) else [value]
        yield from (name for name in names if isinstance(name, str) and name.startswith("[r]"))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
