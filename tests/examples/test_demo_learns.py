"""The demo learns both tasks, with the real encoder and the real texts."""

import re

import pytest

from opendelta import demo


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    outcome = demo.run(train_size=100, test_size=60, epochs=1)
    plain, lora, adapter, both = outcome.rows
    assert [plain.what, lora.what, adapter.what, both.what] == [
        "MiniLM", "lora", "adapter", "lora + adapter",
    ]  # fmt: skip
    assert both.parameters == lora.parameters + adapter.parameters < 0.02 * plain.parameters
    assert both.size == lora.size + adapter.size < 0.02 * plain.size
    printed, noise = capfd.readouterr()
    assert noise == ""
    lines = [line.rstrip() for line in printed.splitlines()]
    assert "bert.encoder.layer.5.output.dense:  y = adapter(dense(x) + lora(x))" in lines
    rows = [line for line in lines if re.match("│ (questions|messages) ", line)]
    assert rows == 2 * rows[:2]  # there and back
    assert re.search(r"questions │ lora \+ adapter │ +6 │ .* all 360 │", rows[0])
    assert re.search(r"messages  │ spam +│ +2 │ .* all 120 │", rows[1])
    assert "detached, the first one first: that MiniLM is as it was, bit for bit" in lines
    assert list(outcome.mixed) == [
        "a new LoRA alone", "the sum of the three", "a gate over the three",
    ]  # fmt: skip
    for what, share in outcome.mixed.items():
        assert [line for line in lines if re.match(rf"│ {what} +│ .* │ +{share:.3f} │$", line)]
    epochs = [line for line in lines if re.match(r"epoch 1: loss \d\.\d+, test accuracy ", line)]
    assert len(epochs) == 2
    assert lines[-1] == (
        f"test accuracy: {both.accuracy:.3f} on questions, {outcome.messages:.3f} on messages"
    )
    assert len(lines) < 105
    assert not [line for line in lines if "{'" in line or "UserWarning" in line]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_third_of_the_demo_learns_both_tasks(capfd):
    outcome = demo.run(train_size=1200, test_size=300, epochs=2, quiet=True)
    assert outcome.questions >= 0.85 > 0.4 > outcome.rows[0].accuracy
    assert outcome.messages >= 0.94
    lora, summed, gated = outcome.mixed.values()
    assert gated > max(lora, summed) + 0.05
    assert capfd.readouterr() == ("", "")
