"""Our model class for lm-evaluation-harness against the harness's own, on tasks made here.

Both run the same weights and the same tokenizer; the tasks are local JSON files, so no network is
used. max_length is small: some prompts are cut from the left and some texts take several windows.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed: make test-lm-eval")
pytest.importorskip("accelerate", reason="accelerate is not installed: make test-lm-eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from batchwright.errors import ConfigError, RequestError
from batchwright.integrations.lm_eval import BatchwrightLM
from tests.engine.smollm2 import reference_model

# The harness and the libraries under it are not ours to keep free of warnings.
pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]

MAX_LENGTH = 96
LONG = "The committee met on Tuesday to discuss the new budget for the library and the park. "

CHOICES: list[dict[str, Any]] = [
    {"question": question, "choices": choices, "answer": answer}
    for question, choices, answer in [
        ("What is the capital of France?", ["Paris", "London", "Rome"], 0),
        ("What colour is the sky on a clear day?", ["green", "blue"], 1),
        ("How many legs does a spider have?", ["six", "eight", "a hundred and ten"], 1),
        ("Which animal says 'moo'?", ["the cow", "the cat", "the duck", "the horse"], 0),
        ("What is 2 + 2?", ["5", "4", "22"], 1),
        ("What do bees make?", ["milk", "honey", "bread"], 1),
        ("Which is the largest planet?", ["Mars", "Jupiter", "Earth"], 1),
        ("In which season does snow fall?", ["summer", "winter"], 1),
        ("What is frozen water called?", ["steam", "ice", "sand", "glass"], 1),
        ("Who wrote Hamlet?", ["Charles Dickens", "William Shakespeare"], 1),
        (LONG * 8 + "On which day did they meet?", ["Monday", "Tuesday"], 1),
        ("What is the opposite of 'hot'?", ["cold", "warm", "wet"], 0),
    ]
]
PROMPTS = [
    "Name three rivers in Europe.\n",
    "The capital of France is",
    "Q: What is the largest planet?\nA:",
    "def fibonacci(n):\n",
    "Once upon a time, there was a",
    "1, 2, 3, 4,",
    LONG * 8 + "They agreed that",
    "Dear Sir or Madam,\n\nI am writing to",
]
DOCUMENTS = [
    "A short text.",
    "Naïve café: 日本語 and 🙂.",
    "The river runs through the valley, and in spring the farmers open the gates. " * 20,
    LONG * 3,
]


@pytest.fixture(scope="module")
def ours() -> BatchwrightLM:
    return BatchwrightLM("smollm2", max_length=MAX_LENGTH, max_num_batched_tokens=256)


@pytest.fixture(scope="module")
def theirs(ours: BatchwrightLM) -> HFLM:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=ours.tokenizer.backend,
        **ours.tokenizer.special_tokens,
        chat_template=ours.tokenizer.chat_template,
    )
    return HFLM(
        pretrained=reference_model(),
        tokenizer=tokenizer,
        max_length=MAX_LENGTH,
        batch_size=4,
        softmax_dtype="float64",  # torch's log_softmax in fp32 is off by 2e-5 nats a token here
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")

    def task(name: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": source,
            "test_split": "test",
            **settings,
        }

    return [
        task(
            "ours_choices",
            CHOICES,
            output_type="multiple_choice",
            doc_to_text="Question: {{question}}\nAnswer:",
            doc_to_choice="{{choices}}",
            doc_to_target="{{answer}}",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        task(
            "ours_texts",
            [{"prompt": prompt, "target": ""} for prompt in PROMPTS],
            output_type="generate_until",
            doc_to_text="{{prompt}}",
            doc_to_target="{{target}}",
            generation_kwargs={"until": ["\n\n", "."], "max_gen_toks": 24, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        ),
        task(
            "ours_documents",
            [{"text": text} for text in DOCUMENTS],
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        ),
    ]


@pytest.fixture(scope="module")
def evaluations(
    ours: BatchwrightLM, theirs: HFLM, tasks: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (
        lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0)
        for model in (ours, theirs)
    )
    return first, second


def responses(evaluation: dict[str, Any], task: str) -> list[Any]:
    """What the model answered, per document in order."""
    samples = sorted(evaluation["samples"][task], key=lambda sample: sample["doc_id"])
    return [[answer for (answer,) in sample["resps"]] for sample in samples]


def test_multiple_choice(evaluations: tuple[dict[str, Any], dict[str, Any]]) -> None:
    our_answers, their_answers = (responses(e, "ours_choices") for e in evaluations)
    assert [len(answers) for answers in our_answers] == [len(row["choices"]) for row in CHOICES]
    pairs = [
        (mine, other)
        for my_row, other_row in zip(our_answers, their_answers, strict=True)
        for mine, other in zip(my_row, other_row, strict=True)
    ]
    largest = max(abs(mine[0] - other[0]) for mine, other in pairs)
    assert largest < 1e-3, f"{largest} nats"
    assert [mine[1] for mine, _ in pairs] == [other[1] for _, other in pairs]
    for metric in ("acc,none", "acc_norm,none"):
        accuracy, expected = (e["results"]["ours_choices"][metric] for e in evaluations)
        assert accuracy == expected
        assert 0.5 < accuracy <= 1
    print(f"{len(pairs)} log-likelihoods, largest difference {largest:.1e} nats")


def test_generated_texts(evaluations: tuple[dict[str, Any], dict[str, Any]]) -> None:
    our_texts, their_texts = (responses(e, "ours_texts") for e in evaluations)
    assert our_texts == their_texts
    texts = [text for (text,) in our_texts]
    assert len(texts) == len(PROMPTS) and len(set(texts)) == len(PROMPTS)
    assert not any("\n\n" in text or "." in text for text in texts)


def test_rolling_perplexity(evaluations: tuple[dict[str, Any], dict[str, Any]]) -> None:
    our_sums, their_sums = (responses(e, "ours_documents") for e in evaluations)
    for (mine,), (other,), text in zip(our_sums, their_sums, DOCUMENTS, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
        assert mine < -len(text) / 100
    ours_ppl, theirs_ppl = (e["results"]["ours_documents"] for e in evaluations)
    key = "word_perplexity,none"
    assert ours_ppl[key] == pytest.approx(theirs_ppl[key], rel=1e-4)


def test_chat_template(ours: BatchwrightLM, theirs: HFLM) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a river. <|im_end|>"},
    ]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    prefilled = [*history, {"role": "assistant", "content": "The"}]
    text = ours.apply_chat_template(prefilled, add_generation_prompt=False)
    assert text == theirs.apply_chat_template(prefilled, add_generation_prompt=False)
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert (ours.eot_token_id, ours.prefix_token_id) == (
        theirs.eot_token_id,
        theirs.prefix_token_id,
    )


def generation(context: str, **gen_kwargs: Any) -> Instance:
    return Instance("generate_until", {}, (context, gen_kwargs), 0)


def test_special_token_in_until_ends_the_text(ours: BatchwrightLM) -> None:
    chat = ours.apply_chat_template([{"role": "user", "content": "Say hello."}])
    plain, stopped = ours.generate_until(
        [
            generation(chat, until=[], max_gen_toks=20),
            generation(chat, until=["<|im_end|>"], max_gen_toks=20),
        ],
        disable_tqdm=True,
    )
    assert plain == stopped != ""
    params = ours._sampling_params({"until": ["<|im_end|>", "", "x"], "max_gen_toks": 5})
    assert params.stop == ("x",)
    assert params.stop_token_ids == (ours.eot_token_id,)


def test_generation_arguments(ours: BatchwrightLM) -> None:
    params = ours._sampling_params(
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 7, "num_beams": 1}
    )
    assert (params.temperature, params.top_p, params.max_tokens) == (0.7, 0.9, 7)
    assert ours._sampling_params({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert ours._sampling_params({"until": "\n"}).max_tokens == ours.max_gen_toks
    with pytest.raises(ConfigError, match=r"num_beams.*10.*supported: .*temperature"):
        ours._sampling_params({"num_beams": 10})
    with pytest.raises(ConfigError, match="typical_p"):
        ours.generate_until([generation("x", typical_p=0.9)], disable_tqdm=True)


def test_request_that_cannot_run_is_named(ours: BatchwrightLM) -> None:
    fine, empty = generation("fine", max_gen_toks=2), generation("", max_gen_toks=2)
    with pytest.raises(RequestError, match=r"1 of 2 generate_until requests.*request 1: .*empty"):
        ours.generate_until([fine, empty], disable_tqdm=True)
    with pytest.raises(RequestError, match="request 0: max_gen_toks is 96"):
        ours.generate_until([generation("x", max_gen_toks=96)], disable_tqdm=True)
    with pytest.raises(RequestError, match="request 1: its continuation has 97 tokens"):
        ours._loglikelihood_tokens([(("a", "b"), [5], [6]), (("a", "b"), [5], [6] * 97)])
    (text,) = ours.generate_until([fine], disable_tqdm=True)  # the engine is none the worse
    assert text


def test_cut_from_the_left_with_a_warning(
    ours: BatchwrightLM, caplog: pytest.LogCaptureFixture
) -> None:
    context = ours.tok_encode(LONG * 8)
    with caplog.at_level(logging.WARNING, logger="batchwright"):
        cut, whole = ours._loglikelihood_tokens(
            [(None, context, [7042]), (None, context[-MAX_LENGTH:], [7042])], disable_tqdm=True
        )
    assert cut == whole
    assert [record.args[:3] for record in caplog.records] == [(0, len(context) + 1, MAX_LENGTH + 1)]


def test_registered_under_its_name() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("batchwright") is BatchwrightLM
    # What the harness's command line passes along must not be taken for an engine setting.
    with pytest.raises(ConfigError, match="unknown settings: max_seqs;"):
        get_model("batchwright").create_from_arg_obj(
            {"pretrained": "smollm2", "max_seqs": 8},
            {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"},
        )
