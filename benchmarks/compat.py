"""What we write, loaded by the tools that people have: do they give the same tokens? This is `make compat`.

    python -m benchmarks.compat [--strategy F] [--only CONSUMER,...] [--models NAME,...] [--out docs/COMPATIBILITY.md]

Each consumer gets a virtual environment of its own under `build/compat/`, without amoeba. It loads a folder of ours as
its users do, and continues a prompt greedily. What it must give is what the masked supernet gives in PyTorch, which
shares no code with the writers. The table goes to stdout and to the page; the exit code is 1 when a cell says `differs`
or `failed`.

The demo's strategy is calibrated with the recipe `quick` unless one is given; the tiny models have seeded noise. Needs
the network for the packages, ten minutes, and 6 GB of disk.
"""
# Long on purpose: one script, read from top to bottom.

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from amoeba_export.calibrate import calibrate, load_recipe
from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.model_type import AMOEBA, container_type
from amoeba_export.formats.write import format_dtypes, write_formats
from amoeba_export.ir import DenseArchitecture, LayerPlan, Shape, Subnet, SubnetPlan, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet, read_strategy, write_strategy
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import masked_logits
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import noise_strategy
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "compat"
NUM_TOKENS = 32
TEXTS = (
    "The river rises in the hills north of the town and runs for",
    "To bake a good loaf of bread you need flour, water, salt and",
    "The capital of France is a city that people visit because",
)
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A row of the table.

    Attributes:
        name: Of its environment.
        packages: What pip installs there.
        runs: Its function in `consumers.py`.
        container: What it is given, with the `open_writer` options that make it.
        cannot: Whether a plan is beyond it.
    """

    name: str
    packages: tuple[str, ...]
    runs: str
    container: str
    dtype: str = "fp32"
    dialect: str | None = None
    cannot: Callable[[DenseArchitecture], bool] = lambda dense: False


CONSUMERS = (
    Consumer(
        name="transformers-5",
        packages=(TORCH, "numpy", "transformers>=5.23,<6"),
        runs="transformers",
        container="safetensors",
    ),
    Consumer(
        name="transformers-4",
        packages=(TORCH, "numpy", "transformers==4.57.*"),
        runs="transformers",
        container="safetensors",
        cannot=lambda dense: container_type(dense) == AMOEBA,
    ),
    Consumer(name="ort", packages=("numpy", "onnxruntime"), runs="onnxruntime", container="onnx", dialect="ort"),
    Consumer(
        name="genai",
        packages=("numpy", "onnxruntime-genai"),
        runs="onnxruntime_genai",
        container="onnx",
        dialect="ort",
    ),
    Consumer(
        name="optimum-onnx",
        packages=(TORCH, "numpy", "optimum-onnx[onnxruntime]"),
        runs="optimum_onnx",
        container="onnx",
        dialect="ort",
        cannot=lambda dense: len({dims.num_kv_heads for dims in dense.layers if dims.num_heads}) > 1,
    ),
    Consumer(name="openvino", packages=("numpy", "openvino"), runs="openvino", container="onnx", dialect="standard"),
    Consumer(name="llamacpp", packages=("xllamacpp",), runs="llama_cpp", container="gguf", dtype="fp16"),
)


@dataclass(frozen=True, slots=True)
class Model:
    """A column of the table: what is cut, and prompts of which one is chosen."""

    name: str
    supernet: Supernet
    plan: SubnetPlan
    prompts: tuple[tuple[int, ...], ...]


def demo_models(strategy: Path | None) -> Iterator[Model]:
    from transformers import AutoTokenizer

    supernet = load_supernet("demo")
    kept = strategy or HOME / "strategy.safetensors"
    if not kept.is_file():
        write_strategy(calibrate(supernet, load_recipe("quick"), seed=0), kept)
    supernet = dataclasses.replace(supernet, strategy=read_strategy(kept))
    tokenizer = AutoTokenizer.from_pretrained(supernet.folder)
    prompts = tuple(tuple(tokenizer(text).input_ids) for text in TEXTS)
    uniform, adaptive = (_plan(supernet, "24x0.75", policy) for policy in ("uniform", "adaptive"))
    yield Model("SmolLM2 24x1", supernet, _plan(supernet, "24x1", "uniform"), prompts)
    yield Model("SmolLM2 24x0.75", supernet, uniform, prompts)
    yield Model("SmolLM2 24x0.75 adaptive", supernet, _without_attention(adaptive, 5), prompts)


def tiny_models() -> Iterator[Model]:
    for family in ("qwen3", "qwen2", "mistral"):
        folder = HOME / "models" / family
        shutil.rmtree(folder, ignore_errors=True)
        save_tiny(folder, family)
        save_bpe(folder)
        supernet = load_supernet(str(folder))
        supernet = dataclasses.replace(supernet, strategy=noise_strategy(supernet.architecture))
        for shape in ("3x1", "3x0.5"):
            plan = _plan(supernet, shape, "uniform")
            yield Model(f"tiny {family} {shape}", supernet, plan, tuple(tuple(range(i, i + 12)) for i in (3, 40, 70)))


def _plan(supernet: Supernet, shape: str, policy: str) -> SubnetPlan:
    assert supernet.strategy is not None
    return derive_plan(supernet.strategy, supernet.architecture, Shape.parse(shape), CutRules(policy=policy))


def _without_attention(plan: SubnetPlan, idx: int) -> SubnetPlan:
    """One layer loses all its heads, so that there is a layer without attention and without KV cache."""
    old = plan.layers[idx]
    bare = LayerPlan(source_layer=old.source_layer, query_heads=(), kv_heads=(), ffn=old.ffn)
    return dataclasses.replace(plan, layers=(*plan.layers[:idx], bare, *plan.layers[idx + 1 :]))


def reference_tokens(
    supernet: Supernet, plan: SubnetPlan, prompt: Sequence[int], draft: Sequence[int] = ()
) -> tuple[list[int], float]:
    """Greedy, by full passes of the masked supernet, and how far the second choice was behind where it was nearest.

    A pass checks as much of `draft` as is right and adds one token: a draft saves passes and changes nothing.
    """
    tokens: list[int] = []
    while True:
        guess = [*tokens, *draft[len(tokens) : NUM_TOKENS]]
        sequence = torch.tensor([[*prompt, *guess]])
        logits_TV = masked_logits(supernet, plan, sequence)[0, len(prompt) - 1 :]
        picks = logits_TV.argmax(-1).tolist()
        right = next((i for i, token in enumerate(guess) if token != picks[i]), len(guess))
        tokens = picks[: right + 1]
        if len(tokens) >= NUM_TOKENS:
            first_T, second_T = logits_TV[:NUM_TOKENS].topk(2).values.unbind(-1)
            return tokens[:NUM_TOKENS], float(((first_T - second_T) / first_T.abs()).min())


def environment(consumer: Consumer) -> Path:
    """The interpreter of a consumer, made and filled when it is not there."""
    folder = HOME / consumer.name
    python = folder / "bin" / "python"
    stamp = folder / ".packages"
    wanted = "\n".join(consumer.packages)
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted):
        print(f"Installing {', '.join(consumer.packages)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *consumer.packages], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def written(model: Model, subnet: Subnet, consumer: Consumer) -> Path:
    """The folder that this consumer is given. Raises `NotRepresentable`."""
    kind = "-".join(filter(None, (consumer.container, consumer.dtype, consumer.dialect)))
    folder = HOME / "artifacts" / model.name.replace(" ", "-") / kind
    if folder.is_dir():
        return folder / consumer.container
    dtypes = format_dtypes(subnet.architecture, [consumer.container], consumer.dtype, explicit=True)
    options = {"onnx": {"dialect": consumer.dialect}} if consumer.dialect else {}
    folder.mkdir(parents=True)
    write_formats(subnet, folder, dtypes, options=options)
    return folder / consumer.container


def ask(python: Path, consumer: Consumer, folder: Path, prompt: Sequence[int]) -> Mapping[str, object] | str:
    """The answer of a consumer, or the last line of what it had to say instead."""
    done = subprocess.run(
        [python, ROOT / "benchmarks" / "consumers.py", consumer.runs, folder, json.dumps(prompt), str(NUM_TOKENS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=HOME,
        timeout=1800,
        env={"PATH": "/usr/bin:/bin", "HOME": str(HOME), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1]
    answer: Mapping[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def choose_prompt(model: Model, subnet: Subnet) -> tuple[tuple[int, ...], list[int], float]:
    """The prompt whose continuation is furthest from a tie, which f16 may break as it likes, and that continuation.

    And how far behind the second choice is where it is nearest, as a share of the first one's logit.
    """
    drafting = next(one for one in CONSUMERS if one.name == "ort")
    folder = written(model, subnet, drafting)
    candidates = []
    for prompt in model.prompts:
        answer = ask(environment(drafting), drafting, folder, prompt)
        draft = [] if isinstance(answer, str) else answer["tokens"]
        tokens, margin = reference_tokens(model.supernet, model.plan, prompt, draft)  # type: ignore[arg-type]
        candidates.append((margin, prompt, tokens))
    margin, prompt, tokens = max(candidates)
    return prompt, tokens, margin


def judge(tokens: Sequence[int], expected: Sequence[int], end_tokens: set[int]) -> str:
    """`same`, or where the first difference is. Either may stop at an end token, and give it or not."""
    tokens, expected = _until_end(tokens, end_tokens), _until_end(expected, end_tokens)
    if tokens == expected:
        return "same"
    idx = next((i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), len(tokens))
    return f"differs from token {idx}"


def _until_end(tokens: Sequence[int], end_tokens: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens))
    return list(tokens[:stop])


def _end_tokens(supernet: Supernet) -> set[int]:
    ends = supernet.architecture.config.get("eos_token_id")
    return set(ends) if isinstance(ends, list) else {ends}


def check_model(
    model: Model, consumers: Sequence[Consumer], versions: dict[str, str], say: Callable[[str], None]
) -> tuple[dict[str, str], float]:
    """Consumer -> what came of it; and how near to a tie the reference comes."""
    shutil.rmtree(HOME / "artifacts", ignore_errors=True)
    subnet = materialize_subnet(model.supernet, model.plan)
    prompt, expected, margin = choose_prompt(model, subnet)
    say(f"{model.name}: the second choice is {margin:.2%} behind where it is nearest")
    needs_code = container_type(subnet.architecture) == AMOEBA
    cells = {}
    for consumer in consumers:
        if consumer.cannot(subnet.architecture):
            cells[consumer.name] = "-"
            continue
        try:
            folder = written(model, subnet, consumer)
        except NotRepresentable as error:
            cells[consumer.name] = "refused"
            say(f"{model.name}, {consumer.name}: {error}")
            continue
        answer = ask(environment(consumer), consumer, folder, prompt)
        if isinstance(answer, str):
            cells[consumer.name] = "failed"
            say(f"{model.name}, {consumer.name}: {answer}")
            continue
        versions[consumer.name] = str(answer["version"])
        tokens: list[int] = answer["tokens"]  # type: ignore[assignment]
        verdict = judge(tokens, expected, _end_tokens(model.supernet))
        with_code = consumer.container == "safetensors" and needs_code
        cells[consumer.name] = f"{verdict}, with the code beside the weights" if with_code else verdict
        say(f"{model.name}, {consumer.name}: {cells[consumer.name]}")
        if verdict != "same":
            say(f"  {tokens}\n  {expected}")
    return cells, margin


_PAGE = """# Compatibility

This page shows which runtimes load the files of amoeba and give the same tokens as PyTorch. `make compat`
writes it. Each runtime was installed in its own environment, without amoeba. It loaded a folder that amoeba had
written, and continued a prompt by {num_tokens} tokens (greedy decoding).

| cell | meaning |
|---|---|
| same | the same tokens as the masked supernet in PyTorch: all of them, or up to an end token |
| refused | the format cannot hold this plan. An export refuses it before it writes anything (exit code 7) |
| - | the runtime has no type for the plan (transformers 4), or one size of KV cache for all layers (optimum-onnx) |

{table}

- **Precision.** Weights are fp32; in GGUF they are f16.
- **ONNX** is in the dialect `ort`, for OpenVINO in `standard`.
- **SmolLM2** is SmolLM2-135M-Instruct with a calibrated strategy. 24x0.75 has compensation biases. Its adaptive plan
  has a layer without attention.
- **The tiny models** have four layers and seeded weights.

If two tokens are almost equally likely, rounding chooses between them: f16 weights alone move a logit of
SmolLM2 by up to 0.14 % of the largest logit. So each model has three prompts, and the test takes the prompt
whose continuation is furthest from a tie. The last row shows the smallest distance between the first and the
second choice of the reference, as a share of the logit of the first choice.

Reference: torch {torch}, {platform}.
"""


def page(
    models: Sequence[Model],
    columns: Mapping[str, Mapping[str, str]],
    margins: Mapping[str, float],
    versions: Mapping[str, str],
) -> str:
    """The page: a row for each consumer, a column for each model."""
    consumers = list(next(iter(columns.values())))
    rows = [
        ["consumer", "container", *(model.name for model in models)],
        ["---"] * (2 + len(models)),
    ]
    for consumer in CONSUMERS:
        if consumer.name in consumers:
            cells = (columns[model.name][consumer.name] for model in models)
            kind = f"{consumer.container}, {consumer.dialect}" if consumer.dialect else consumer.container
            rows.append([versions.get(consumer.name, consumer.name), kind, *cells])
    rows.append(["distance to the second choice", "", *(f"{margins[model.name]:.2%}" for model in models)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _PAGE.format(num_tokens=NUM_TOKENS, table=table, torch=torch.__version__, platform=f"Python {version}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--models", type=lambda text: text.split(","), help="words that a model's name must have")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "COMPATIBILITY.md")
    settings = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    consumers = [one for one in CONSUMERS if settings.only is None or one.name in settings.only]
    models = [*demo_models(settings.strategy), *tiny_models()]
    if settings.models:
        models = [model for model in models if any(word in model.name for word in settings.models)]
    versions: dict[str, str] = {}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = {model.name: check_model(model, consumers, versions, say) for model in models}
    columns = {name: cells for name, (cells, _) in found.items()}
    text = page(models, columns, {name: margin for name, (_, margin) in found.items()}, versions)
    print(text)
    settings.out.write_text(text, encoding="utf-8")
    bad = [cell for cells in columns.values() for cell in cells.values() if cell.startswith(("differs", "failed"))]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
