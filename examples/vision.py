"""Adapt a small vision transformer to another kind of picture, by a LoRA and trained norms.

The script first trains a small ViT to tell four shapes apart, drawn
bright on dark. The deltas then adapt it to faint shapes in noise. The score is the share of
held-out pictures that are named right; the baseline is the ViT without the deltas.

    python examples/vision.py
"""

import argparse

import torch
from transformers import ViTConfig, ViTForImageClassification

import opendelta

SIZE = 16


def pictures(count, faint):
    """Squares, crosses, disks and stripes at random places: {pixel_values, labels}."""
    rows = torch.arange(SIZE).view(1, SIZE, 1) - torch.randint(6, 11, (count, 1, 1))
    columns = torch.arange(SIZE).view(1, 1, SIZE) - torch.randint(6, 11, (count, 1, 1))
    shapes = torch.stack([
        (rows.abs() < 4) & (columns.abs() < 4),
        ((rows.abs() < 2) | (columns.abs() < 2)) & (rows.abs() < 5) & (columns.abs() < 5),
        rows**2 + columns**2 < 20,
        (rows % 4 < 2) & (columns.abs() < 5) & (rows.abs() < 5),
    ], 1).float()  # fmt: skip
    labels = torch.randint(4, (count,))
    drawn = shapes[torch.arange(count), labels]
    drawn = 0.5 - 0.3 * drawn + 0.1 * torch.randn_like(drawn) if faint else drawn
    return {"pixel_values": drawn.unsqueeze(1), "labels": labels}


def train(model, faint, steps, rate):
    """Train what requires gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = model.train()(**pictures(64, faint)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"  loss {loss.item():.3f}")


@torch.no_grad()
def score(model, faint):
    """The share of 500 pictures that are named right."""
    held = pictures(500, faint)
    named = model.eval()(held["pixel_values"]).logits.argmax(-1)
    return (named == held["labels"]).float().mean().item()


def main(steps):
    """Train, compare, and print the score."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        image_size=SIZE, patch_size=4, num_channels=1, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=96, num_labels=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip
    print("a small ViT learns four shapes")
    train(model, False, 2 * steps, 1e-3)
    opendelta.LNTuningModel(model)
    delta = opendelta.LoraModel(model, modified_modules=["attn.q", "attn.v"], common_structure=True)
    delta.freeze_module(exclude=["deltas"])
    print("a LoRA and trained norms adapt it to faint shapes in noise")
    train(model, True, steps, 5e-3)
    with opendelta.composition(model).only():
        baseline = score(model, True)
    print(f"score {score(model, True):.3f}, baseline {baseline:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps of the deltas")
    main(parser.parse_args().steps)
