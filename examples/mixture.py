"""A mixture of four LoRA experts with a gate that takes the best two for each token.

The gate and the experts learn together to sort questions; a balance loss keeps all experts in use.
The baseline is the share of the largest class.

    python examples/mixture.py
"""

import argparse

import torch

import opendelta
from opendelta import GateModel, LoraModel, demo
from opendelta.demo import data


def main(train_size):
    """Train, show who is used where, and print the score."""
    data.check_packages()
    torch.manual_seed(0)
    texts = data.load("questions", train_size, 300, seed=0)
    model = demo.load_backbone(len(texts.classes))
    places = [r"[r]layer\.[2345]\.attention\.self\.(query|value)"]
    experts = [
        LoraModel(model, modified_modules=places, lora_r=4, name=f"expert{i}") for i in range(4)
    ]
    gate = GateModel(model, deltas=experts, top_k=2, modules_to_save=["classifier"])
    gate.freeze_module(exclude=["deltas"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    model.train()
    for at in range(0, len(texts.train), 16):
        batch = texts.collate(texts.train[at : at + 16])
        with opendelta.watching(model) as seen:
            loss = model(**batch).loss
        balance = opendelta.balance_loss(seen, "gate", batch["attention_mask"])
        (loss + 0.02 * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        if at % 320 == 0:
            print(f"loss {loss.item():.3f}, balance {balance.item():.3f} (1 is even)")
    model.eval()

    right = 0
    for at in range(0, len(texts.test), 50):
        batch = texts.collate(texts.test[at : at + 50])
        with torch.no_grad(), opendelta.watching(model) as seen:
            right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    for module, weights in seen["gate"].items():
        used = weights.reshape(-1, 4).mean(0)
        print(module, " ".join(f"{share:.2f}" for share in used.tolist()))
    largest = demo.labels_of(texts).bincount().max().item() / len(texts.test)
    print(f"score {right / len(texts.test):.3f}, baseline {largest:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train-size", type=int, default=2000, help="questions to learn from")
    main(parser.parse_args().train_size)
