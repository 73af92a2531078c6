"""`examples/check_tokens.py` against llama.cpp's own server, and against stand-ins for vLLM."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from amoeba_export.api import ExportRequest, export
from amoeba_export.artifact import read_manifest
from tests.formats.bpe import save_bpe
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/check_tokens.py"
CHECK: dict[str, Any] = runpy.run_path(str(SCRIPT))
SERVER = """
import sys, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx = 256
settings.verbosity = -1
settings.chat_template = "chatml"
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(settings)
print("LISTENS", server.listening_address, flush=True)
sys.stdin.read()
import os
os._exit(0)
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("far")
    model = save_tiny(root / "model")
    save_bpe(model)
    out = root / "dist"
    export(ExportRequest(model=str(model), shape="4x1", dtype="fp32", formats=("safetensors", "gguf"), out=out))
    return out


def edited(artifact: Path, folder: Path, form: str) -> Path:
    """The manifest alone, with another second token of a format."""
    data = json.loads((artifact / "amoeba.json").read_text())
    for one in data["continuations"]:
        if one["format"] == form:
            one["tokens"][1] = (one["tokens"][1] + 1) % 64
    (folder / "amoeba.json").write_text(json.dumps(data))
    return folder


def test_the_manifest_has_what_each_format_goes_on_with(artifact: Path) -> None:
    found = read_manifest(artifact).continuations
    assert [one.format for one in found] == ["safetensors", "gguf"]
    assert found[0].prompt == found[1].prompt
    assert len(found[0].tokens) == 8
    assert found[1].tokens == found[0].tokens[: len(found[1].tokens)]


def test_llama_cpp_answers_the_same(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(artifact / "gguf/model.gguf")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert server.stdin and server.stdout
    try:
        url = next(line.split()[1] for line in server.stdout if line.startswith("LISTENS"))
        right = _run(artifact, "llama-server", "--url", url)
        assert (right.returncode, right.stdout[:8]) == (0, "The same"), right.stderr
        wrong = _run(edited(artifact, tmp_path, "gguf"), "llama-server", "--url", url)
        assert wrong.returncode == 1, wrong.stderr
        assert wrong.stdout.startswith("Token 2 is ")
    finally:
        server.kill()
        server.wait()


VLLM = """
class SamplingParams:
    def __init__(self, **settings):
        assert settings == {"temperature": 0.0, "max_tokens": 8, "logprobs": 20, "ignore_eos": True}, settings

class One:
    def __init__(self, **values):
        self.__dict__.update(values)

class LLM:
    def __init__(self, model, max_model_len):
        import torch
        from transformers import AutoModelForCausalLM
        self.model = AutoModelForCausalLM.from_pretrained(model)
    def generate(self, prompts, settings):
        import torch
        ids, chosen, likely = list(prompts[0]["prompt_token_ids"]), [], []
        for _ in range(8):
            with torch.no_grad():
                found = torch.log_softmax(self.model(torch.tensor([ids])).logits[0, -1], -1)
            top = found.topk(20)
            likely.append({int(i): One(logprob=float(x)) for x, i in zip(top.values, top.indices)})
            chosen.append(int(top.indices[0]))
            ids.append(chosen[-1])
        return [One(outputs=[One(token_ids=chosen, logprobs=likely)])]
"""
"""What the script asks of vLLM, by transformers."""


def test_in_vllms_python(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(VLLM)
    right = _run(artifact, "vllm", path=tmp_path)
    assert (right.returncode, right.stdout) == (0, "The same 8 tokens.\n"), right.stderr


@pytest.fixture
def vllm_server(artifact: Path) -> Iterator[str]:
    """A server that answers as `vllm serve` does, with the artifact's own tokens."""
    tokens = read_manifest(artifact).continuations[0].tokens

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "small"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["return_tokens_as_token_ids"] and asked["temperature"] == 0 and asked["model"] == "small"
            likely = [{f"token_id:{one}": -0.5, f"token_id:{(one + 1) % 64}": -0.55} for one in tokens]
            found = {"tokens": [f"token_id:{one}" for one in tokens], "top_logprobs": likely}
            self.answer({"choices": [{"logprobs": found}]})

        def answer(self, content: object) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_a_vllm_server(artifact: Path, vllm_server: str, tmp_path: Path) -> None:
    right = _run(artifact, "vllm-server", "--url", vllm_server)
    assert (right.returncode, right.stdout) == (0, "The same 8 tokens.\n"), right.stderr
    tie = _run(edited(artifact, tmp_path, "safetensors"), "vllm-server", "--url", vllm_server)
    assert tie.returncode == 0
    assert "0.050 nats less likely: a tie" in tie.stdout


@pytest.mark.parametrize(
    ("steps", "same", "said"),
    [
        ([(5, {5: -0.1}), (6, {6: -0.2})], True, "The same 2 tokens."),
        ([(5, {5: -0.1})], True, "The same 1 tokens."),
        ([(5, {5: -0.1}), (9, {9: -0.2, 6: -0.25})], True, "a tie"),
        ([(5, {5: -0.1}), (9, {9: -0.2, 6: -0.9})], False, "Token 2 is 9, and ours, 6, is 0.700 nats less likely"),
        ([(8, {8: -0.1})], False, "is not among its 1 likeliest"),
        ([], False, "no token"),
    ],
)
def test_what_is_the_same(steps: list[Any], same: bool, said: str) -> None:
    found = CHECK["verdict"]([5, 6], steps, 0.1)
    assert found[0] is same
    assert said in found[1]


def test_an_artifact_without_tokens_cannot_be_checked(tmp_path: Path) -> None:
    (tmp_path / "amoeba.json").write_text("{}")
    ran = _run(tmp_path, "vllm")
    assert (ran.returncode, ran.stdout) == (2, "")


def _run(artifact: Path, runtime: str, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path or ""), "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(artifact), "--runtime", runtime, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
