"""Two tasks on one MiniLM: each has a LoRA with a classifier of its own, and they take turns.

One model in memory sorts questions into six classes and finds spam among messages. The baseline of
each task is the share of its largest class; the score is the mean of the two tasks.

    python examples/multitask.py
"""

import argparse

import torch

import opendelta
from opendelta import demo
from opendelta.demo import data


def learn(model, batches, rate=5e-3):
    """Train what requires gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def score(model, texts):
    """The share of the test texts that are sorted right."""
    model.eval()
    right = 0
    for at in range(0, len(texts.test), 50):
        batch = texts.collate(texts.test[at : at + 50])
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(texts.test)


def main(train_size):
    """Train each task, switch between them, and print the score."""
    data.check_packages()
    torch.manual_seed(0)
    tasks = {n: data.load(n, train_size, 300, seed=0) for n in ("questions", "messages")}
    model = demo.load_backbone(2)
    for name, texts in tasks.items():
        delta = opendelta.LoraModel(
            model, name=name, modules_to_save=["classifier"], num_labels=len(texts.classes)
        )
        delta.freeze_module(exclude=[name])
        with opendelta.composition(model).only(name):
            rows = [texts.train[i : i + 16] for i in range(0, len(texts.train), 16)]
            learn(model, [texts.collate(row) for row in rows])
        print(f"{name}: learned")
    scores, baselines = [], []
    for name, texts in tasks.items():
        with opendelta.composition(model).only(name):
            scores.append(score(model, texts))
        labels = demo.labels_of(texts)
        baselines.append(labels.bincount().max().item() / len(labels))
        print(f"{name}: {scores[-1]:.3f}, the largest class {baselines[-1]:.3f}")
    opendelta.composition(model).save("multitask")
    print(f"score {sum(scores) / 2:.3f}, baseline {sum(baselines) / 2:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train-size", type=int, default=1200, help="texts of each task")
    main(parser.parse_args().train_size)
