"""What the package promises as a whole: budgets, imports, public names."""

import subprocess
import sys
from pathlib import Path

import lint_budget

import opendelta

SOURCE = Path(opendelta.__file__).parent


def test_methods_and_functions_are_short():
    assert not lint_budget.broken()


def test_every_file_says_what_it_owns():
    for path in SOURCE.rglob("*.py"):
        assert path.read_text().startswith('"""'), path


def test_importing_it_imports_no_heavy_library():
    script = (
        "import sys, opendelta; "
        "print(sorted({'transformers', 'accelerate', 'peft', 'typer', 'sympy', 'http.server', "
        "'opendelta._picker.session', "
        "'torch.distributed.tensor', 'huggingface_hub', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_rooms_are_there_without_imports_of_their_own():
    names = ["interop.peft.save", "interop.legacy.load_state_dict", "plot.weights", "author.Block",
             "integrations.trainer.DeltaCallback", "studies.Overlap"]  # fmt: skip
    script = f"""if True:
        import os, opendelta
        for name in {names}:
            if (child := os.fork()) == 0:
                print(eval("opendelta." + name).__name__, flush=True)
                os._exit(0)
            os.waitpid(child, 0)
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.split() == [name.rpartition(".")[2] for name in names], result.stderr


def test_every_public_name_is_documented():
    for name in opendelta.__all__:
        assert getattr(opendelta, name).__doc__, name


def test_the_version_is_that_of_the_installed_package():
    assert opendelta.__version__.startswith("1.0.0")
