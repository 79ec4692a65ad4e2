"""The model that the first example loads, without a network; what pages register is forgotten."""

import pytest
import torch
import transformers

from opendelta._deltas.registry import BLOCKS, METHODS


@pytest.fixture(autouse=True)
def registered():
    """What is registered stays as it is."""
    tables = [(table, dict(table)) for table in (METHODS, BLOCKS)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """`from_pretrained("roberta-base")` gives a model of that configuration, in an empty folder."""

    def from_pretrained(name):
        assert name == "roberta-base"
        torch.manual_seed(0)
        return transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
            )
        ).eval()

    auto = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
