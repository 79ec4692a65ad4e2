"""Train one composition on two processes, each on its half of the data, with torch's DDP.

    torchrun --nproc-per-node 2 examples/distributed.py

The pretrained model is a small classifier of points, made in the script. The deltas adapt it to
points that are turned by a third of a circle. The baseline is the model without deltas.
"""

import argparse
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import opendelta


def points(count, turn, seed):
    """Points in four quadrants, turned by an angle: [count, 2], [count]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator)
    labels = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    c, s = math.cos(turn), math.sin(turn)
    return x @ torch.tensor([[c, s], [-s, c]]), labels


def train(model, weights, turn, steps, rate, rank, world):
    """Train on this process's part of each batch."""
    optimizer = torch.optim.AdamW(weights, rate)
    for step in range(steps):
        x, labels = points(64 * world, turn, step)
        loss = nn.functional.cross_entropy(model(x[rank::world]), labels[rank::world])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        print(f"loss {loss.item():.3f}")


def main(steps):
    """Train, check that all processes agree, and print the score."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # all processes start with the same model
    model = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )
    train(model, model.parameters(), 0.0, steps, 1e-2, 0, 1)
    opendelta.LoraModel(model, modified_modules=["0", "2"], lora_r=4)
    delta = opendelta.AdapterModel(model, modified_modules=["2"], bottleneck_dim=8)
    delta.freeze_module(exclude=["deltas"])
    weights = [p for p in model.parameters() if p.requires_grad]
    train(DistributedDataParallel(model), weights, 2 * math.pi / 3, steps, 1e-2, rank, world)
    sums = [torch.zeros(()) for _ in range(world)]
    dist.all_gather(sums, sum(p.detach().double().sum() for p in weights).float())
    assert all(torch.equal(sums[0], each) for each in sums), "the processes differ"
    if rank == 0:
        x, labels = points(1000, 2 * math.pi / 3, seed=10_000)
        score = (model(x).argmax(1) == labels).float().mean().item()
        with opendelta.composition(model).only():
            baseline = (model(x).argmax(1) == labels).float().mean().item()
        opendelta.composition(model).save("distributed")
        print(f"{world} processes; score {score:.3f}, baseline {baseline:.3f}")
    dist.barrier()  # else a process may end while gloo's threads still hold its tensors
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
