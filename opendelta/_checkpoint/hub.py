"""Download a folder of deltas from the Hugging Face hub, and upload one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._deltas.base import BaseDelta
from .._files import folder as files
from .._files.folder import OWN, own_version
from .._files.reading import as_path, readable
from .._show.tree import tree
from ..errors import DeltaLoadError, OptionError, printable, reason, shown
from .pretrained import DELTAS, check_beside
from .saving import save

FILES = ("*.json", "*.safetensors", "*.bin")


def folder_of(
    path: str | os.PathLike,
    local_files_only: bool = False,
    argument: str = "folder",
    **options: Any,
) -> Path:
    """Return the local folder of `path`: the path itself, or the download of "user/name".

    A text that starts with "./", "../", "/" or "~" is a path, and no name on the hub. Where
    `save_pretrained` has put deltas beside a model, the result is the folder of the deltas.

    Args:
        argument: the name of the argument that is `path`, for messages.
        options: for `huggingface_hub.snapshot_download`: `cache_dir`, `force_download`.

    Raises:
        OptionError: `path` is neither a path nor a name.
        DeltaLoadError: there is no such folder here, and no such name on the hub; or the model in
            it was saved without the deltas beside it.
    """
    folder = _folder_of(path, local_files_only, argument, **options)
    with readable(folder):
        inside = not files.is_ours(folder) and files.is_ours(folder / DELTAS)
    if not inside:
        return folder
    check_beside(folder / DELTAS)
    return folder / DELTAS


def _folder_of(
    path: str | os.PathLike, local_files_only: bool, argument: str, **options: Any
) -> Path:
    order = ", or 'user/name' on the hub; the folder comes first, then the model"
    inside = options.get("cache_dir")
    if inside is not None and isinstance(path, str) and Path(inside, path).is_dir():
        return Path(inside, path)
    folder = as_path(path, argument, hint=order)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
    with readable(folder):
        there = folder.exists() or folder.is_symlink()
        if there or not named or str(path).startswith(("./", "../")):
            return folder
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(path),
                allow_patterns=list(FILES),
                local_files_only=local_files_only,
                **options,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DeltaLoadError(
            f"no delta in {str(path)!r}: there is no such folder here, and the hub says: "
            f"{reason(error)}"
        ) from None


CARD = """\
---
library_name: opendelta
tags: [opendelta, {types}]
{base}---

# {name}

{count} saved by opendelta {version} from a `{backbone}`: {sizes}.

```python
import opendelta

opendelta.load("{name}", model)  # a {backbone}, in full precision or half
```

The model with its deltas:

```text
{tree}
```
"""


def card(deltas: Sequence[BaseDelta], repo_id: str) -> str:
    """Return the page of a repository: its deltas, their sizes, and how to load them."""
    model = deltas[0].backbone_model
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    types = list(dict.fromkeys(delta.delta_type for delta in deltas))
    sizes = [
        f"{delta.name} ({delta.delta_type}, {sum(p.numel() for p in delta.parameters()):,} "
        "parameters)"
        for delta in deltas
    ]
    return CARD.format(
        types=", ".join(types),
        base=f"base_model: {printable(source)}\n" if source and not Path(source).exists() else "",
        name=repo_id,
        count=f"{len(deltas)} deltas" if len(deltas) > 1 else "A delta",
        version=own_version(),
        backbone=type(model).__name__,
        sizes=", ".join(sizes),
        tree=tree(model),
    )


def push(
    deltas: Sequence[BaseDelta], repo_id: str, private: bool | None = None, token: str | None = None
) -> str:
    """Save deltas into a repository on the hub, with a page about them; return its address.

    Args:
        repo_id: "user/name", or "name" for the user's own repository; it is made if need be.
        private: make a new repository private.
        token: the user's token. None: the token of the user who is logged in.

    Raises:
        DeltaError: values are not finite.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses, or is out of reach.
    """
    import huggingface_hub

    if not isinstance(repo_id, str):
        raise OptionError(f"repo_id={shown(repo_id)} must be 'user/name' or 'name' on the hub")
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(deltas, folder, public=True)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        Path(folder, "README.md").write_text(card(deltas, address.repo_id), encoding="utf-8")
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            delete_patterns=OWN,
            commit_message=f"Save {', '.join(delta.name for delta in deltas)}",
        )
    return str(address)
