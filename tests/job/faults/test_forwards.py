"""Forward passes of the real model that fail, through the whole command: the row to blame fails
alone, the others have the answers of an undisturbed job, and the same command then completes it."""

import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from batchwright.cli import main as cli
from batchwright.cli import run as run_command
from batchwright.llm import LLM
from batchwright.step import Step
from tests.job.fakes import chat_row, write_lines
from tests.job.faults.fake_command import outcome

pytestmark = pytest.mark.cpu

Fault = Callable[[Step, list[str]], None]

LONG = "You are a careful assistant who answers in one word. " * 4
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
ROWS: list[Any] = [
    chat_row("greedy", LONG + "Say one.", max_tokens=7, temperature=0),
    chat_row("greedy-2", LONG + "Say two.", max_tokens=5, temperature=0, logprobs=True),
    chat_row("sampled", "Tell me about rivers.", max_tokens=8),
    chat_row("twice", "A word for tea?", max_tokens=6, n=2, seed=5),
    chat_row("form", "How old are you?", max_tokens=6, temperature=0, response_format=FORM),
    {"id": "list", "prompt": ["The sky is", "Once upon"], "max_tokens": 4, "temperature": 0},
    {"id": "score", "context": "The capital of France is", "continuation": " Paris."},
    {"id": "embed", "input": ["A cat.", "A dog."]},
    {"id": "bad", "prompt": "x", "temperature": "hot"},
]
IDS = [row.get("custom_id") or row["id"] for row in ROWS[:-1]]
GENERATING = IDS[:6]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", max_model_len=256, max_num_batched_tokens=64, max_num_seqs=6)


class Command:
    """Runs the command on ROWS in this process, with one model; the fault is of the next run."""

    def __init__(self, llm: LLM, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Fault = lambda step, ids: None
        self.num_faults = 0
        self._root, self._monkeypatch = root, monkeypatch
        engine, execute = llm.engine, llm.engine._execute

        def faulty(step: Step) -> Any:
            rows = engine._scheduler.requests_of(step)
            try:
                self.fault(step, [id.partition("\0")[0] for id in rows])
            except Exception:
                self.num_faults += 1
                raise
            return execute(step)

        monkeypatch.setattr(engine, "_execute", faulty)
        monkeypatch.setattr(run_command, "load", lambda model, settings: llm)

    def __call__(self, name: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """(exit status, bodies by id, error codes by id)."""
        folder = self._root / name
        folder.mkdir(exist_ok=True)
        source = write_lines(folder / "in.jsonl", ROWS)
        argv = ["batchwright", "run", source, "-o", folder / "out.jsonl", "--model", "smollm2"]
        self._monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        found = outcome(folder)
        bodies = {line["custom_id"]: line["response"]["body"] for line in found["succeeded"]}
        for body in bodies.values():  # what was shared may differ, what was answered may not
            body["usage"].pop("prompt_tokens_details", None)
        codes = {line["custom_id"]: line["error"]["code"] for line in found["failed"]}
        return int(ended.value.code or 0), bodies, codes


@pytest.fixture
def command(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(llm, tmp_path, monkeypatch)


@pytest.fixture
def expected(command: Command) -> dict[str, Any]:
    status, bodies, codes = command("calm")
    assert (status, list(codes), sorted(bodies)) == (1, ["bad"], sorted(IDS))
    return bodies


def check(
    command: Command, name: str, expected: dict[str, Any], culprit: str | None = None
) -> None:
    """If there were faults, only the culprit fails, and without them the same command completes
    the job."""
    command.num_faults = 0
    _, bodies, codes = command(name)
    failing = culprit if command.num_faults else None
    assert codes == {"bad": "invalid_request"} | ({failing: "internal_error"} if failing else {})
    assert bodies == {id: body for id, body in expected.items() if id != failing}
    if failing is not None:
        command.fault = lambda step, ids: None
        _, bodies, codes = command(name)
        assert (bodies, list(codes)) == (expected, ["bad"])


def raise_from(number: int, culprit: str) -> Fault:
    """At the Nth forward pass of a row, and at each later one in which it takes part."""
    count = 0

    def fault(step: Step, ids: list[str]) -> None:
        nonlocal count
        count += culprit in ids
        if culprit in ids and count >= number:
            raise ValueError("this forward pass fails")

    return fault


POINTS = [
    pytest.param([("greedy", 3), ("list", 1), ("twice", 2)], id="some"),
    pytest.param(list(product(IDS, range(1, 10))), id="every", marks=[pytest.mark.slow]),
]


@pytest.mark.parametrize("points", POINTS)
def test_a_row_that_breaks_its_nth_forward(
    command: Command, expected: dict[str, Any], points: list[tuple[str, int]]
) -> None:
    num_hit = 0
    for row, number in points:
        command.fault = raise_from(number, row)
        check(command, f"{row}-{number}", expected, row)
        num_hit += command.num_faults > 0
    print(f"{len(points)} points, {num_hit} hit")
    assert num_hit >= len(points) / 3


@pytest.mark.parametrize(
    "numbers", [range(2, 14, 5), pytest.param(range(1, 40), marks=pytest.mark.slow)], ids=str
)
def test_one_failure_changes_nothing(
    command: Command, expected: dict[str, Any], numbers: range
) -> None:
    num_hit = 0
    for number in numbers:
        count = 0

        def fault(step: Step, ids: list[str], number: int = number) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise ValueError("this forward pass fails")

        command.fault = fault
        check(command, str(number), expected)
        if not command.num_faults:  # the job has fewer forward passes
            break
        num_hit += 1
    print(f"{num_hit} forward passes failed")
    assert num_hit >= min(len(numbers), 10) - 1


def test_rows_that_fail_only_beside_each_other(command: Command, expected: dict[str, Any]) -> None:
    def fault(step: Step, ids: list[str]) -> None:
        if {"sampled", "twice"} <= set(ids):
            raise ValueError("they cannot be computed together")

    command.fault = fault
    check(command, "together", expected)
    assert command.num_faults


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_lack_of_memory_blames_nobody(
    command: Command, expected: dict[str, Any], llm: LLM, times: int
) -> None:
    limits = llm.engine._scheduler.limits
    limits.max_running, limits.max_tokens = 6, 64  # a test before this one may have lowered them

    def fault(step: Step, ids: list[str]) -> None:
        if command.num_faults < times:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    command.fault = fault
    check(command, "memory", expected)
    assert command.num_faults == times


@pytest.mark.parametrize(
    "row",
    ["form", *(pytest.param(id, marks=pytest.mark.slow) for id in GENERATING if id != "form")],
)
def test_logits_that_are_not_numbers(
    command: Command, expected: dict[str, Any], llm: LLM, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    executor = llm.engine._executor
    forward = executor._forward  # type: ignore[attr-defined]
    scheduler = llm.engine._scheduler

    def poisoned(step: Step) -> Any:
        hidden = forward(step)
        for index, slot in enumerate(step.slots):
            sequence = scheduler.books.slots.sequences[slot]
            assert sequence is not None
            if sequence.request.id.partition("\0")[0] == row:
                hidden[step.cu_seqlens_q[index] : step.cu_seqlens_q[index + 1]] = float("nan")
        return hidden

    with monkeypatch.context() as patch:
        patch.setattr(executor, "_forward", poisoned)
        _, bodies, codes = command("nan")
    assert codes == {"bad": "invalid_request", row: "invalid_logits"}
    assert bodies == {id: body for id, body in expected.items() if id != row}
    check(command, "nan", expected)
