"""A save that is killed, finds no space or meets others leaves the old content or the new."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support import TESTS

pytestmark = pytest.mark.covers("Composition.save")

if os.name != "posix":
    pytest.skip("processes are forked", allow_module_level=True)

WORKER = TESTS / "support" / "saving_worker.py"
PAIR = [".json", ".safetensors"]
OWN = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=256k none "$0"'


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the worker saw: it runs once, on a small disk of its own if the system lets it."""
    root, disk = tmp_path_factory.mktemp("saves"), tmp_path_factory.mktemp("disk")
    command = [sys.executable, str(WORKER), str(root), str(disk)]
    if shutil.which("unshare"):
        mounts = subprocess.run([*OWN, MOUNT, str(disk)], capture_output=True, check=False)
        if mounts.returncode == 0:
            command = [*OWN, f'{MOUNT} && exec "$@"', str(disk), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_at_any_moment_leaves_the_old_content_or_the_new(seen):
    assert {json.dumps(state) for state in seen["random"]["states"]} <= {"[1, [1.0]]", "[3, [3.0]]"}


def test_a_kill_before_each_step_leaves_the_old_content_until_the_config_is_replaced(seen):
    states = seen["steps"]["states"]
    old, new = [1, [1.0]], [2, [2.0]]
    assert [states[f"fsync {n}"] for n in range(1, 5)] == [old, old, old, new]
    assert [states[f"replace {n}"] for n in range(1, 4)] == [old, old, new]
    assert set(map(str, states.values())) == {str(old), str(new)}


def test_the_next_save_clears_what_killed_ones_left(seen):
    assert seen["steps"]["left"] > 0
    assert seen["random"]["files"] == seen["steps"]["files"] == PAIR


def test_writers_at_once_leave_the_content_of_one_of_them_and_readers_see_whole_ones(seen):
    states = seen["writers"]["states"]
    assert len(states) > 3
    assert all(values == [float(count)] for count, values in states)
    assert seen["writers"]["ended"] == [0, 0, 0, 0]
    assert seen["writers"]["files"] == PAIR


def test_a_full_disk_leaves_the_old_content_and_nothing_else(seen):
    full = seen["full"]
    assert full["raised"] == ("ENOSPC" if full["mounted"] else "EFBIG")
    assert full["state"] == [1, [1.0]]
    assert full["files"] == PAIR
