"""Coverage-guided fuzzing of one target: `python -m tests.fuzz.run TARGET [SECONDS]`.

A target is a module of this folder with `run(data)`, which raises if something is wrong, `seeds()`
and `WORDS`. Inputs that reach new code are kept in out/fuzz/TARGET and used by the next run; an
input that fails is left beside them, and `python -m tests.fuzz.run TARGET FILE` tries it again.
`make fuzz` runs every target; test_targets.py runs them without coverage.
"""

from __future__ import annotations

import resource
import sys
from importlib import import_module
from pathlib import Path

TARGETS = (
    "rows",
    "gguf_header",
    "safetensors_header",
    "row_template",
    "answer_parts",
    "upload_form",
)
RSS_MIB, TIMEOUT_S, MAX_BYTES = 2048, 20, 16384
ADDRESS_BYTES = 4 << 30  # more than was mapped at the start: a larger allocation fails


def main(target: str, extent: str) -> None:
    """Fuzz for some seconds, or try one file."""
    import atheris

    with atheris.instrument_imports(include=["batchwright", "jinja2", "python_multipart"]):
        module = import_module(f"tests.fuzz.{target}")
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_BYTES,) * 2)
    if not extent.isdecimal():
        module.run(Path(extent).read_bytes())
        return
    corpus = Path("out/fuzz") / target
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(module.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    words = corpus.with_suffix(".dict")
    words.write_text("".join(f'"{quoted(word)}"\n' for word in module.WORDS))
    options = [
        *(f"-max_total_time={extent}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={RSS_MIB}"),
        *(f"-max_len={MAX_BYTES}", "-len_control=10", f"-dict={words}", "-print_final_stats=1"),
        f"-artifact_prefix={corpus}-",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], module.run)
    atheris.Fuzz()


def quoted(word: str) -> str:
    """A word as the fuzzer's dictionary has it."""
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "120")
