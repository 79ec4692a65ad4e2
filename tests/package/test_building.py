"""The sdist and the wheel: built, installed in an environment of their own, and run."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest
import yaml
from support import ROOT

FACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd):
    """What a command prints; it must end well."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The sdist of a clone, and the wheel that is built of the sdist alone."""
    folder = tmp_path_factory.mktemp("packages")
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / "clone" / name)
    script = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"
    run(sys.executable, "-c", script.format("sdist"), str(folder), cwd=folder / "clone")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", script.format("wheel"), str(folder), cwd=source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(packages):
    names = set(zipfile.ZipFile(packages[1]).namelist())
    tracked = run("git", "ls-files", "opendelta", cwd=ROOT).splitlines()
    there = {name for name in tracked if (ROOT / name).is_file()}
    assert {name for name in names if ".dist-info/" not in name} == there
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(packages, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = str(home / "bin" / "python")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", str(packages[1]), cwd=tmp_path)
    # The dependencies come after it, as plain paths: an editable install there stays unseen.
    (own,) = (home / "lib").glob("python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    script = (
        "import opendelta, torch; print(opendelta.__file__, opendelta.__version__); "
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4)); "
        "opendelta.LoraModel(model, modified_modules=['0']).save_finetuned('delta'); "
        "print(opendelta.load('delta', torch.nn.Sequential(torch.nn.Linear(4, 4)), "
        "check_backbone=False).names)"
    )
    out = run(python, "-W", "ignore", "-c", script, cwd=tmp_path)
    assert out.split() == [str(own / "opendelta/__init__.py"), FACTS["version"], "['lora']"]
    command = str(home / "bin" / "opendelta")
    assert run(command, "--version", cwd=tmp_path) == f"opendelta {FACTS['version']}\n"
    assert "lora" in run(command, "show", "delta", cwd=tmp_path)


def test_the_version_to_cite_is_that_of_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["title"]) == (FACTS["version"], FACTS["name"])
    assert cited["license"] == FACTS["license"]


def test_what_is_said_of_python_has_run():
    claimed = [line.rpartition(" ")[2] for line in FACTS["classifiers"] if ":: 3." in line]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in claimed
    assert len(claimed) == 1
    assert FACTS["requires-python"] == f">={claimed[0]}"
