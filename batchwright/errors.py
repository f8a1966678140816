"""Every exception this package raises on purpose.

BatchwrightError
├── ConfigError            a setting is impossible, unknown or contradicts another
├── InputError             an input file cannot be used at all (missing, unreadable, empty)
├── OutputError            results cannot be written (no space, no permission)
├── ModelError             a model cannot be used
│   ├── ModelNotFoundError     nothing at that path or name
│   ├── ModelFormatError       files are there but damaged, truncated or hostile
│   └── UnsupportedModelError  sound files of a kind this version cannot run
├── RequestError           one row is bad; that row fails and the others go on
├── ResourceError          the machine lacks memory, or room for a temporary file
│   └── GoneError              processes that compute are gone; this one cannot go on
│       ├── RankError              one that has a part of the model has failed or is gone
│       └── ReplicaError           none is left that could run rows
└── ShapeError             arrays that must agree do not

Messages say what was wrong, the value, the limit and the remedy. `assert` is kept for our own bugs.
"""

from __future__ import annotations


class BatchwrightError(Exception):
    """Base of all errors meant for a user's eyes; the command line prints the message alone."""


class ConfigError(BatchwrightError):
    """A setting is impossible, unknown, or contradicts another."""


class InputError(BatchwrightError):
    """An input file cannot be used at all."""


class OutputError(BatchwrightError):
    """Results cannot be written."""


class ModelError(BatchwrightError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError):
    """There is no model at the given path or name."""


class ModelFormatError(ModelError):
    """The model files are damaged, truncated or lie about their own sizes."""


class UnsupportedModelError(ModelError):
    """The model files are sound, but this version cannot run them."""


class ResourceError(BatchwrightError):
    """The machine lacks memory, or room for a temporary file. What is finished is kept."""


class GoneError(ResourceError):
    """Processes that compute are gone: this one computes nothing any more. What is finished is
    kept."""


class RankError(GoneError):
    """One of the processes that have a model together has failed. What is finished is kept."""


class ReplicaError(GoneError):
    """All processes that have an engine each are gone. What is finished is kept."""


class ShapeError(BatchwrightError):
    """Arrays that must agree in shape do not."""


class RequestError(BatchwrightError):
    """One request is bad. It fails alone.

    Args:
        message: what was wrong, the value, the limit and the remedy.
        code: OpenAI's error code where one fits (`invalid_json_line`, `duplicate_custom_id`, ...).
        param: the name of the offending parameter, if there is one.
        line: 1-based line of the input file, if there is one.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.line = line
