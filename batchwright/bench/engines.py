"""Other engines that ours can be measured against: what each reads, and how it is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from batchwright.errors import ConfigError

GGUF, DIRECTORY = "a GGUF file", "a Hugging Face directory"
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_SPIN = "GOMP_SPINCOUNT"
_OUR_SPIN = "3000"


@dataclass(frozen=True, slots=True)
class EngineKind:
    """An engine we have a runner for.

    Attributes:
        runner: file in `peers/`.
        reads: kinds of model files.
        dtypes: it can be told to compute in; none: as its file is.
    """

    runner: str
    reads: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


KINDS = {
    "vllm": EngineKind("run_vllm.py", (DIRECTORY,)),
    "openvino": EngineKind("run_openvino.py", (GGUF, DIRECTORY)),
    "llama.cpp": EngineKind("run_llamacpp.py", (GGUF,), ()),
    "transformers": EngineKind("run_transformers.py", (DIRECTORY,)),
}


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine to be measured against.

    Attributes:
        label: as the user has written it: "openvino" or "openvino:bfloat16".
        python: interpreter of the environment that it is installed in.
        model: its model file or directory.
    """

    label: str
    kind: EngineKind
    python: str
    model: str
    dtype: str

    @property
    def command(self) -> list[str]:
        """What runs it, but for the folder."""
        return [self.python, str(Path(__file__).parent / "peers" / self.kind.runner)]


def find_peers(
    against: Sequence[str], pythons: Sequence[str], models: Sequence[str], model: Path
) -> list[Peer]:
    """What the command line says, as engines.

    Args:
        against: "ENGINE" or "ENGINE:DTYPE".
        pythons, models: "ENGINE=PATH".
        model: ours; engines for which no other is named read it, if they can.
    Raises:
        ConfigError: an unknown engine or number format, a missing interpreter, or a model of a
            kind that the engine does not read.
    """
    named_pythons, named_models = (
        _by_engine(pythons, "--python"),
        _by_engine(models, "--peer-model"),
    )
    peers = [_peer(label, named_pythons, named_models, model) for label in against]
    asked = {peer.label.partition(":")[0] for peer in peers}
    for option, named in (("--python", named_pythons), ("--peer-model", named_models)):
        if unused := sorted(named.keys() - asked):
            raise ConfigError(f"{option} names {unused[0]}, which no --against asks for")
    labels = [peer.label for peer in peers]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"--against {twice} is given twice")
    return peers


def _by_engine(texts: Sequence[str], option: str) -> dict[str, str]:
    named = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"{option} {text!r:.80}: write ENGINE=PATH")
        named[_known(name, option)] = path
    return named


def _known(name: str, option: str) -> str:
    if name not in KINDS:
        raise ConfigError(f"{option}: unknown engine {name!r:.40}; known: {', '.join(KINDS)}")
    return name


def _peer(label: str, pythons: Mapping[str, str], models: Mapping[str, str], model: Path) -> Peer:
    name, _, dtype = label.partition(":")
    kind = KINDS[_known(name, "--against")]
    if dtype and dtype not in kind.dtypes:
        computes = " or ".join(kind.dtypes) if kind.dtypes else "as its file is"
        raise ConfigError(f"--against {label:.80}: {name} computes {computes}")
    python = pythons.get(name, sys.executable)
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise ConfigError(f"--python {name}={python}: there is no interpreter that can be run")
    chosen = Path(models.get(name, str(model))).expanduser()
    if not chosen.exists():
        raise ConfigError(f"--peer-model {name}={chosen}: there is no such file or directory")
    if (DIRECTORY if chosen.is_dir() else GGUF) not in kind.reads:
        raise ConfigError(
            f"{name} reads {' or '.join(kind.reads)}, not {chosen}; name one with "
            f"--peer-model {name}=PATH"
        )
    return Peer(label, kind, python, str(chosen.resolve()), dtype or "float32")


def peer_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that a user of another engine has: without what is ours in it."""
    mine = {name: value for name, value in environment.items() if name not in _OURS}
    if mine.get(_SPIN) == _OUR_SPIN:  # importing this package has set it
        del mine[_SPIN]
    return mine
