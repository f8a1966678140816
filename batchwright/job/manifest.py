"""The manifest: what the answers of a job depend on. A resumed job must have the same.

Device, batch and scheduling options are not in it: they change no answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from batchwright import __version__
from batchwright.errors import ConfigError
from batchwright.job.durable import write_private

Manifest = Mapping[str, Any]

_WHAT_TO_DO = "give the same as before, name another output, or start over with --force"


def job_manifest(identity: Mapping[str, Any], settings: Mapping[str, Any]) -> Manifest:
    """The manifest of a job.

    Args:
        identity: what answers depend on of the model and the engine.
        settings: how rows become prompts: columns, templates.
    """
    return {"engine": __version__, **identity, **settings}


def check_manifest(path: Path, manifest: Manifest) -> bool:
    """Compare with the manifest of an earlier run, or write the first.

    Returns:
        Whether there was an earlier run.
    Raises:
        ConfigError: as `compare_manifest`.
        OutputError: it cannot be written.
    """
    begun = compare_manifest(path, manifest)
    if not begun:
        write_private(path, msgspec.json.format(msgspec.json.encode(dict(manifest)), indent=2))
    return begun


def compare_manifest(path: Path, manifest: Manifest) -> bool:
    """Compare with the manifest of an earlier run, if there was one; nothing is written.

    Returns:
        Whether there was an earlier run.
    Raises:
        ConfigError: a field differs (all that do are named), or the file is damaged.
    """
    if not path.exists():
        return False
    before = _read(path)
    _compare(before, manifest, sorted({*before, *manifest}))
    return True


def check_known(path: Path, known: Manifest) -> None:
    """Compare with the manifest of an earlier run, if there is one, what is known so far.

    Raises:
        ConfigError: as `compare_manifest`.
    """
    if path.exists():
        before = _read(path)
        _compare(before, known, [field for field in known if field in before])


def _read(path: Path) -> Manifest:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); {_WHAT_TO_DO}") from error


def _compare(before: Manifest, manifest: Manifest, fields: Iterable[str]) -> None:
    differences = [
        f"{field} was {before.get(field)!r:.120}, is {manifest.get(field)!r:.120}"
        for field in fields
        if before.get(field) != manifest.get(field)
    ]
    if differences:
        what = "; ".join(differences)
        raise ConfigError(f"this job was begun differently: {what}; {_WHAT_TO_DO}")
