"""Saves that are killed, find no space, or meet others; `files/test_crashes.py` runs this.

It forks its processes from one without threads, and prints what it saw as JSON.
"""

import errno
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import opendelta
from opendelta import LoraModel
from opendelta._files.folder import TEMPORARY

KILLS, WRITERS, SAVES = 40, 4, 12


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64))


def composition(count, value, rank=8):
    """`count` deltas all of whose values are `value`."""
    model = backbone()
    for place in range(count):
        delta = LoraModel(model, modified_modules=["0"], lora_r=rank, name=f"d{place}")
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.fill_(value)
    delta.freeze_module()
    return opendelta.composition(model)


def state(folder):
    """[how many deltas, all values] of what `folder` holds."""
    model = backbone()
    deltas = list(opendelta.load(folder, model))
    values = {float(v) for d in deltas for p in d.parameters() for v in p.detach().unique()}
    return [len(deltas), sorted(values)]


def forked(work):
    """The id of a process that does `work`."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def kill_at_random(folder):
    """States after kills at random moments of saving one composition over another."""
    both = [composition(1, 1.0), composition(3, 3.0, rank=200)]
    both[0].save(folder)

    def save_for_ever():
        while True:
            both[1].save(folder)
            both[0].save(folder)

    states = []
    for _ in range(KILLS):
        child = forked(save_for_ever)
        time.sleep(random.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states.append(state(folder))
    both[0].save(folder)
    return {"states": states, "files": sorted(f.suffix for f in folder.iterdir())}


def kill_at_each_step(folder):
    """{step: state after a kill just before it}, of the calls that reach the disk."""
    old, new = composition(1, 1.0), composition(2, 2.0)
    states, left = {}, 0
    for name in ("fsync", "replace", "unlink"):
        for nth in range(1, 5):
            old.save(folder)

            def work(name=name, nth=nth):
                real, calls = getattr(os, name), [0]

                def dies(*args, **options):
                    calls[0] += 1
                    if calls[0] == nth:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)

                setattr(os, name, dies)
                new.save(folder)

            os.waitpid(forked(work), 0)
            left += len([file for file in folder.iterdir() if TEMPORARY.fullmatch(file.name)])
            states[f"{name} {nth}"] = state(folder)
    old.save(folder)
    return {"states": states, "left": left, "files": sorted(f.suffix for f in folder.iterdir())}


def many_writers(folder):
    """States that a reader sees while several processes save, and the last."""
    composition(1, 1.0).save(folder)

    def work(count):
        own = composition(count, float(count), rank=32 * count)
        for _ in range(SAVES):
            own.save(folder)

    children = [forked(lambda count=count: work(count)) for count in range(1, WRITERS + 1)]
    states, ended = [], []
    while len(ended) < WRITERS:
        states.append(state(folder))
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            ended.append(status)
    states.append(state(folder))
    return {"states": states, "ended": ended, "files": sorted(f.suffix for f in folder.iterdir())}


def full_disk(folder):
    """What a save that finds no space raises, and the state after it."""
    composition(1, 1.0).save(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not folder.is_mount():  # no disk of its own that could be full: files that must stay small
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        composition(2, 2.0, rank=2000).save(folder)
        raised = None
    except OSError as error:
        raised = errno.errorcode[error.errno]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {
        "raised": raised,
        "state": state(folder),
        "files": sorted(f.suffix for f in folder.iterdir()),
        "mounted": folder.is_mount(),
    }


def main(root, disk):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    folders = {name: root / name for name in ("random", "steps", "writers")}
    print(json.dumps({
        "random": kill_at_random(folders["random"]),
        "steps": kill_at_each_step(folders["steps"]),
        "writers": many_writers(folders["writers"]),
        "full": full_disk(disk),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
