"""The subcommand that opens a page: pick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import opendelta

from .._deltas import requests
from .._picker import session
from . import models
from .looking import AsJson, Class, Model, Options, Places, Types, as_json, requested


def pick(
    model: Model,
    delta: Types = None,
    option: Options = None,
    at: Places = None,
    browser: Annotated[
        bool, typer.Option(help="Open a browser; --no-browser only prints the address.")
    ] = True,
    port: Annotated[
        int, typer.Option(help="Port of the page; 0: any free port.", min=0, max=65535)
    ] = 0,
    class_name: Class = None,
    json: AsJson = False,
) -> None:
    """Pick modules, methods and options for MODEL on a local page. No weights are needed.

    The page starts with the deltas that are given, as for `plan`, or else with a LoRA. It is served
    on this machine alone. What it submits is printed as lines of Python, or with --json as configs
    for AutoDeltaConfig.from_dict. Exit code 1 if picking was cancelled.

    Example: opendelta pick roberta-base

    Example: opendelta pick config.json --delta lora --option lora_r=16 --no-browser

    Example: opendelta pick roberta-base --json > picked.json
    """
    wanted = requested(delta, option, at) or [requests.parse("lora")]
    built = models.without_weights(model, class_name)
    start = [requests.config_for(built, each) for each in wanted]

    def plan(configs: list[opendelta.DeltaConfig]) -> None:
        opendelta.plan(built, configs)

    called = [model] if class_name is None else [model, "--class", class_name]
    picked = session.pick(built, start, plan, port=port, browser=browser, called=called)
    if picked is None:
        print("opendelta: picking was cancelled", file=sys.stderr)
        raise typer.Exit(1)
    if json:
        configs = [config.to_dict() for config in picked.configs]
        as_json({"configs": configs, "python": picked.python, "command": picked.words})
    else:
        print(f"{picked.python}\n\n# {picked.words}")
