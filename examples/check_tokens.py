"""Whether a runtime answers as the artifact did when amoeba verified it: run this where that runtime is.

    python check_tokens.py dist/small --runtime vllm                                    in vLLM's own Python
    python check_tokens.py dist/small --runtime vllm-server --url http://board:8000     where 'vllm serve' runs
    python check_tokens.py dist/small --runtime llama-server --url http://board:8080    where 'llama-server' runs

`amoeba.json` has the tokens of a text and the eight that each format goes on with. The runtime is asked for its own
eight, and for the likeliest ones at each step: runtimes were seen to drop biases or scales without a word.
Another token is no fault where the runtime itself holds ours to be about as likely (--tie, in nats).

Exit code 0: the same. 1: another model. 2: there is nothing to compare. Needs Python alone, and vLLM for `vllm`.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOP = 20
"""Likeliest tokens that are asked for at each step."""

TIE = 0.1
"""Nats between two tokens of which either may be taken: more than a kernel's rounding, far less than a lost bias."""

Step = tuple[int, dict[int, float]]
"""A token that the runtime chose, and the log-probabilities of the likeliest ones there."""


def ask_vllm(artifact: Path, url: str, prompt: Sequence[int], count: int) -> list[Step]:
    """In this process."""
    from vllm import LLM, SamplingParams

    model = LLM(model=str(artifact / "safetensors"), max_model_len=len(prompt) + count + 8)
    settings = SamplingParams(temperature=0.0, max_tokens=count, logprobs=TOP, ignore_eos=True)
    (reply,) = model.generate([{"prompt_token_ids": list(prompt)}], settings)
    answer = reply.outputs[0]
    return [
        (int(token), {int(key): float(one.logprob) for key, one in found.items()})
        for token, found in zip(answer.token_ids, answer.logprobs, strict=True)
    ]


def ask_vllm_server(artifact: Path, url: str, prompt: Sequence[int], count: int) -> list[Step]:
    """`vllm serve`, whose tokens come as `token_id:17`."""
    name = _get(f"{url}/v1/models")["data"][0]["id"]
    asked = {"temperature": 0, "max_tokens": count, "logprobs": TOP, "ignore_eos": True}
    body = {"model": name, "prompt": list(prompt), **asked, "return_tokens_as_token_ids": True}
    found = _post(f"{url}/v1/completions", body)["choices"][0]["logprobs"]
    return [
        (_id(token), {_id(key): float(value) for key, value in likely.items()})
        for token, likely in zip(found["tokens"], found["top_logprobs"], strict=True)
    ]


def ask_llama_server(artifact: Path, url: str, prompt: Sequence[int], count: int) -> list[Step]:
    """`llama-server`. It stops at an end token."""
    body = {"prompt": list(prompt), "n_predict": count, "temperature": -1.0, "n_probs": TOP, "cache_prompt": False}
    return [
        (int(one["id"]), {int(other["id"]): float(other["logprob"]) for other in one["top_logprobs"]})
        for one in _post(f"{url}/completion", body)["completion_probabilities"]
    ]


RUNTIMES: dict[str, tuple[str, Callable[[Path, str, Sequence[int], int], list[Step]]]] = {
    "vllm": ("safetensors", ask_vllm),
    "vllm-server": ("safetensors", ask_vllm_server),
    "llama-server": ("gguf", ask_llama_server),
}
"""The format that each runs, and how it is asked."""


def verdict(ours: Sequence[int], steps: Sequence[Step], tie: float) -> tuple[bool, str]:
    """Whether a runtime answers as `ours`, and one sentence."""
    if not steps:
        return False, "The runtime gave no token."
    for number, (token, (theirs, likely)) in enumerate(zip(ours, steps, strict=False), 1):
        if token == theirs:
            continue
        if token not in likely:
            return False, f"Token {number} is {theirs}, and ours, {token}, is not among its {len(likely)} likeliest."
        behind = likely[theirs] - likely[token]
        said = f"Token {number} is {theirs}, and ours, {token}, is {behind:.3f} nats less likely"
        return behind <= tie, f"{said}: {'a tie, so the rest says nothing.' if behind <= tie else 'another model.'}"
    return True, f"The same {min(len(ours), len(steps))} tokens."


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, and print one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--runtime", choices=RUNTIMES, required=True)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--tie", type=float, default=TIE)
    settings = parser.parse_args(arguments)
    form, ask = RUNTIMES[settings.runtime]
    manifest = json.loads((settings.artifact / "amoeba.json").read_text(encoding="utf-8"))
    found = [one for one in manifest.get("continuations", []) if one["format"] == form]
    if not found:
        print(f"{settings.artifact}/amoeba.json has no tokens of the format {form}.", file=sys.stderr)
        return 2
    prompt, ours = found[0]["prompt"], found[0]["tokens"]
    steps = ask(settings.artifact, settings.url.rstrip("/"), prompt, len(ours))
    is_same, sentence = verdict(ours, steps, settings.tie)
    print(sentence)
    if not is_same:
        print(f"ours   {ours}\ntheirs {[token for token, _ in steps]}")
    return 0 if is_same else 1


def _id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def _get(url: str) -> Any:
    with urllib.request.urlopen(url) as reply:
        return json.load(reply)


def _post(url: str, body: dict[str, Any]) -> Any:
    return _get(urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}))


if __name__ == "__main__":
    raise SystemExit(main())
