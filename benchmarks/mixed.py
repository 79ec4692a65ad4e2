"""Forward passes with a LoRA and a LoHa on every linear, over those of the plain backbone.

Examples:
    python benchmarks/mixed.py
    python benchmarks/mixed.py --layers 4 --shapes 1x16,1x1
"""

from __future__ import annotations

import argparse

import harness
import peft
import subjects
import torch
from harness import Contestant, Row

import opendelta

MUST = {"8x128": 1.3, "1x16": 1.5}
RANK, ALPHA = 8, 8


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parsed = harness.parser(__doc__, layers=2, rounds=11)
    parsed.add_argument(
        "--shapes", type=harness.shapes, default=[(8, 128), (1, 16)], help="batch x tokens"
    )
    return parsed


def both(plain: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The backbone with both deltas, by opendelta and by PEFT."""
    ours, base = subjects.twin(plain), subjects.twin(plain)
    (lora,) = subjects.loras(ours, 1)
    loha = opendelta.LohaModel(ours, RANK, ALPHA, modified_modules=subjects.LINEARS, name="loha")
    subjects.shake(loha.parameters(), 0.2)
    theirs = peft.get_peft_model(base, subjects.peft_config(), adapter_name=lora.name, mixed=True)
    theirs.add_adapter(
        loha.name, peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=subjects.LINEARS)
    )
    theirs.set_adapter([lora.name, loha.name])
    for delta in (lora, loha):
        subjects.hand_over(delta, theirs)
    return ours, theirs.eval()


@torch.no_grad()
def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each shape."""
    plain = subjects.llama(options)
    ours, theirs = both(plain)
    models = {"plain": plain, "opendelta": ours, "peft": theirs}
    rows = []
    for shape in options.shapes:
        x, case = subjects.embeddings(options, shape), "x".join(map(str, shape))
        outputs = {name: model(inputs_embeds=x)[0] for name, model in models.items()}
        subjects.check_equal(outputs["opendelta"], outputs["peft"], f"LoRA and LoHa, {case}")

        def runs(model: torch.nn.Module, x: torch.Tensor = x) -> Contestant:
            return Contestant(lambda: model(inputs_embeds=x))

        times = harness.race({name: runs(model) for name, model in models.items()}, options)
        must = MUST.get(case)
        rows.append(times.row("forward, LoRA + LoHa", case, "x plain", "plain", must=must))
    return rows


def main(arguments: list[str] | None = None) -> list[Row]:
    """Run it."""
    return harness.run(parser(), measure, arguments)


if __name__ == "__main__":
    main()
