"""Write docs/assets/tree.svg: the tree of the first example of README.md.

python tools/tree_picture.py
"""

from pathlib import Path

import torch
import transformers

import opendelta

FILE = Path(__file__).parent.parent / "docs" / "assets" / "tree.svg"


def backbone() -> transformers.PreTrainedModel:
    """The roberta-base of the example, without weights."""
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
    )
    with torch.device("meta"):
        return transformers.RobertaForSequenceClassification(config)


if __name__ == "__main__":
    model = backbone()
    lora = opendelta.LoraModel(model, modified_modules=["key"], lora_r=1)
    opendelta.AdapterModel(model, modified_modules=["output"], bottleneck_dim=12)
    lora.freeze_module(exclude=["deltas", "classifier"])
    FILE.write_text(str(opendelta.tree(model, to="svg")), encoding="utf-8")
