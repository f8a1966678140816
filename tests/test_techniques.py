"""The list of techniques is that of the files."""

from pathlib import Path

from batchwright.techniques import FAMILIES, describe, names

ROOT = Path(__file__).parent.parent


def test_the_list_is_up_to_date() -> None:
    assert (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8") == describe(), (
        "run: python -m batchwright.techniques > docs/techniques.md"
    )


def test_every_technique_says_what_it_is() -> None:
    text = describe()
    for family in FAMILIES:
        for name in names(family):
            after = text.partition(f"### {name}\n\n")[2]
            assert len(after.partition("\n#")[0].strip()) > 20, name
