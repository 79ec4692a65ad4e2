"""Teach a small T5 a new rule with a LoRA and an adapter, while the T5 stays as it is.

No pretrained T5 is needed: the script first trains a small one to copy digits. The deltas then
teach it to add 3 to each digit. The score is the share of held-out sequences that are right in
every digit; the baseline is the T5 without the deltas.

    python examples/seq2seq.py
"""

import argparse

import torch
from transformers import T5Config, T5ForConditionalGeneration

import opendelta

START = 10  # the first token of the decoder; the digits are 0 to 9


def batch(size, shift):
    """Random sequences of 6 digits, and what is to be said about them."""
    digits = torch.randint(10, (size, 6))
    return {"input_ids": digits, "labels": (digits + shift) % 10}


def train(model, shift, steps, rate):
    """Train what requires gradients."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    model.train()
    for step in range(steps):
        loss = model(**batch(64, shift)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % (steps // 4) == 0:
            print(f"  step {step + 1}: loss {loss.item():.3f}")


def score(model, shift):
    """The share of 200 sequences that are right in every digit."""
    model.eval()
    asked = batch(200, shift)
    said = model.generate(asked["input_ids"], max_new_tokens=6, min_new_tokens=6)[:, 1:]
    return (said == asked["labels"]).all(1).float().mean().item()


def main(steps):
    """Train, compare, and print the score."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=11, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=START, pad_token_id=START, eos_token_id=None,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    print("a small T5 learns to copy")
    train(model, 0, 3 * steps, 3e-3)
    opendelta.LoraModel(model, lora_r=8)
    delta = opendelta.AdapterModel(model, bottleneck_dim=16)
    delta.freeze_module(exclude=["deltas"])
    print("a LoRA and an adapter learn to add 3")
    train(model, 3, steps, 1e-2)
    with opendelta.composition(model).only():
        baseline, copies = score(model, 3), score(model, 0)
    print(f"without the deltas it still copies: {copies:.2f}")
    print(f"score {score(model, 3):.3f}, baseline {baseline:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps of the deltas")
    main(parser.parse_args().steps)
