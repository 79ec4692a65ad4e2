"""Serve many deltas on one backbone: each row of a batch takes its own, in one forward.

Twenty LoRAs are trained, one for each customer, and saved as folders of a few kilobytes. All are
loaded on one model, and a mixed batch is routed row by row. The score is the share of rows that are
answered right; the baseline answers all rows with one LoRA.

    python examples/serving.py
"""

import argparse
import time

import torch
from torch import nn

import opendelta
from opendelta import LoraModel


def backbone():
    """The same model in each process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )


def asked(customer, count):
    """Random questions of a customer, and the right answers."""
    x = torch.randn(count, 8)
    direction = torch.randn(8, generator=torch.Generator().manual_seed(customer))
    return x, (x @ direction > 0).long()


def train(customer, steps):
    """Train a LoRA of a customer on a model of its own, and save it."""
    model = backbone()
    delta = LoraModel(model, modified_modules=["0", "4"], lora_r=2, name=f"customer{customer}")
    delta.freeze_module()
    optimizer = torch.optim.AdamW(delta.parameters(), 2e-2)
    for _ in range(steps):
        x, labels = asked(customer, 64)
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    delta.save_finetuned(f"served/customer{customer}")


def main(customers, steps):
    """Train, load all, route a mixed batch, and print the score."""
    for customer in range(customers):
        train(customer, steps)
    model = backbone().eval()
    for customer in range(customers):
        opendelta.load(f"served/customer{customer}", model)
    who = torch.randint(customers, (512,)).tolist()
    rows = [asked(customer, 1) for customer in who]
    x, labels = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    start = time.perf_counter()
    with torch.no_grad(), opendelta.route(model, [[f"customer{c}"] for c in who]):
        answers = model(x).argmax(1)
    print(f"512 rows of {customers} customers in {1000 * (time.perf_counter() - start):.1f} ms")
    with torch.no_grad(), opendelta.composition(model).only("customer0"):
        baseline = (model(x).argmax(1) == labels).float().mean().item()
    print(f"score {(answers == labels).float().mean().item():.3f}, baseline {baseline:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--customers", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    main(given.customers, given.steps)
