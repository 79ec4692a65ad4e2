"""Sort questions by what they ask for: a LoRA and an adapter on a MiniLM, trained by Trainer.

The texts and the model are those of `opendelta demo`. The baseline is the share of the largest
class.

    python examples/classification.py
"""

import argparse

import torch
import transformers

import opendelta
from opendelta import demo
from opendelta.demo import data


def main(train_size, epochs):
    """Train, save, load on a new model, and print the score."""
    data.check_packages()
    texts = data.load("questions", train_size, test_size=500, seed=0)
    torch.manual_seed(0)
    model = demo.load_backbone(len(texts.classes))
    opendelta.LoraModel(model, modules_to_save=["classifier"])
    delta = opendelta.AdapterModel(model)
    delta.freeze_module(exclude=["deltas"])
    print(opendelta.tree(model))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            "classification",
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            save_strategy="no",
            report_to=[],
            logging_steps=20,
            warmup_steps=0.1,
            use_cpu=True,
        ),
        data_collator=texts.collate,
        train_dataset=texts.train,
        optimizers=(torch.optim.AdamW(opendelta.optimizer_groups(model)), None),
    )
    trainer.train()
    opendelta.composition(model).save("classification/deltas")

    fresh = demo.load_backbone(len(texts.classes)).eval()
    opendelta.load("classification/deltas", fresh)
    right = 0
    for at in range(0, len(texts.test), 50):
        batch = texts.collate(texts.test[at : at + 50])
        with torch.no_grad():
            right += (fresh(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    largest = demo.labels_of(texts).bincount().max().item() / len(texts.test)
    print(f"score {right / len(texts.test):.3f}, baseline {largest:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train-size", type=int, default=2000, help="questions to learn from")
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()
    main(given.train_size, given.epochs)
