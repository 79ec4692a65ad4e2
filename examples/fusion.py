"""AdapterFusion: adapters of two tasks, fused for a third with few examples.

One adapter learns to sort questions, another to find spam. A fusion of both then learns from few
texts to sort the two kinds of texts mixed, eight classes in all. The baseline is a classifier that
is trained on the same few texts on the plain MiniLM.

    python examples/fusion.py
"""

import argparse

import torch

import opendelta
from opendelta import AdapterModel, FuseModel, demo
from opendelta.demo import data
from opendelta.demo.training import accuracy, predict


def learn(model, texts, epochs, rate):
    """Train what requires gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(texts.train)).split(16):
            model(**texts.collate([texts.train[i] for i in rows])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def main(train_size, few):
    """Train the adapters, then the fusion, and print the score."""
    data.check_packages()
    torch.manual_seed(0)
    tasks = {n: data.load(n, train_size, 400, seed=0) for n in ("questions", "messages")}
    mixed = data.mixed(list(tasks.values()), few)
    model = demo.load_backbone(len(mixed.classes))
    labels = demo.labels_of(mixed)
    places = [r"[r]layer\.[345]\.output\.dense"]
    for name, texts in tasks.items():
        adapter = AdapterModel(
            model, modified_modules=places, bottleneck_dim=16, name=name,
            modules_to_save=["classifier"], num_labels=len(texts.classes),
        )  # fmt: skip
        adapter.freeze_module(exclude=[name])
        with opendelta.composition(model).only(name):
            learn(model, texts, 1, 5e-3)
        print(f"{name}: learned")
    fuse = FuseModel(
        model, deltas=list(tasks), value=False, modules_to_save=["classifier"],
        num_labels=len(mixed.classes),
    )  # fmt: skip
    fuse.freeze_module(exclude=["fuse"])
    learn(model, mixed, 12, 5e-3)
    fused = accuracy(predict(model, mixed), labels)
    for delta in list(opendelta.composition(model)):
        delta.detach()
    model.requires_grad_(False).classifier.requires_grad_(True)
    learn(model, mixed, 12, 5e-2)
    print(f"score {fused:.3f}, baseline {accuracy(predict(model, mixed), labels):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train-size", type=int, default=1200, help="texts of each task")
    parser.add_argument("--few", type=int, default=40, help="mixed texts of each task")
    given = parser.parse_args()
    main(given.train_size, given.few)
