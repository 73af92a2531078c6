"""Every reader, as the commands use it: a file is read, and what was read is used at once.

A crash that waits behind the reader counts as the reader's: it promised sound content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from amoeba_export.application.resolve import read_plan
from amoeba_export.artifact import read_manifest, verify_checksums
from amoeba_export.artifact.provenance import provenance_problems
from amoeba_export.backends.targets import graph_options, parse_options, read_target
from amoeba_export.builds.lock import read_lock
from amoeba_export.builds.outcome import read_report
from amoeba_export.builds.read import read_config
from amoeba_export.builds.report import write_reports
from amoeba_export.calibrate import load_recipe
from amoeba_export.cli import inspect as cli
from amoeba_export.errors import NotAsWritten
from amoeba_export.evaluate import pareto, read_quality, read_tasks, task_names
from amoeba_export.finetune.data import read_examples
from amoeba_export.ir import Shape, SubnetPlan, Supernet, validate
from amoeba_export.ir.derive import derive_plan
from amoeba_export.load import check_strategy, import_upstream, load_supernet, read_strategy
from amoeba_export.load.refit import read_refit
from amoeba_export.materialize.inputs import check_inputs
from amoeba_export.model.data import DataRecipe, read_documents, read_questions
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.tokenizer import open_tokenizer
from amoeba_export.profile import read_table
from amoeba_export.refit.recipe import load_refit_recipe
from tests.fuzz.valid import MODEL

IMPORTED_LATE = (LayerStack,)
"""What a reader imports at its first damaged file and not before: that takes seconds, which are not the file's."""


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read.

    Attributes:
        file: Its place below the root that `make_valid` filled.
        read: Read the file and use what it says. Raises `AmoebaError`.
        form: How it is mutated: `json`, `toml`, `jsonl`, `safetensors`, `npy`, `zip`, `gguf`.
    """

    file: str
    read: Callable[[Path], object]
    form: str


def model(folder: Path) -> Supernet:
    return load_supernet(str(folder), cache_dir=folder.parent / "cache")


def supernet(file: Path) -> None:
    made = model(file.parent)
    assert SubnetPlan.full(made.architecture).dense(made.architecture).num_params > 0


def weights(file: Path) -> None:
    made = model(file.parent)
    for name in made.tensors.names():
        made.tensors.read(name)


def gguf(file: Path) -> None:
    load_supernet(str(file), cache_dir=file.parent / "cache")


def adapter(file: Path, base: str = "config") -> None:
    folder = file.parent
    made = load_supernet(str(folder.parent / base), adapters=[folder], cache_dir=folder.parent / "cache")
    (opened,) = made.adapters
    for width in opened.width_choices or (None,):
        plan = SubnetPlan.full(made.architecture)
        plan = SubnetPlan(shape=plan.shape, policy=plan.policy, layers=plan.layers, gate_width=width)
        for module in opened.modules():
            opened.delta(module, plan)


def smol(file: Path) -> None:
    adapter(file, "smol-model")


def upstream(file: Path) -> None:
    architecture = model(file.parent.parent / "smol-model").architecture
    strategy = import_upstream(file, architecture)
    derive_plan(strategy, architecture, Shape(architecture.num_layers, 1.0))


def strategy(file: Path) -> None:
    made = model(file.parent.parent / "config")
    found = read_strategy(file)
    inspect(file)
    check_strategy(found, made)
    for shape in (Shape(3, 0.5), Shape(4, 0.75), *list(found.quality)[:2]):
        validate(derive_plan(found, made.architecture, shape), made.architecture)


def refit(file: Path) -> None:
    found = read_refit(file)
    made = model(file.parent.parent / "config")
    cut = dataclasses.replace(
        read_plan(file.parent.parent / "plan" / "plan.json"), refit_id=found.identity, model_id=made.identity
    )
    check_inputs(dataclasses.replace(made, refits={found.identity: found}), [cut])
    for name in found.tensors.names():
        found.tensors.read(name)


def refit_recipe(file: Path) -> None:
    found = load_refit_recipe(file)
    assert found.identity


def tokenizer(file: Path) -> None:
    open_tokenizer(file.parent)


def plan(file: Path) -> None:
    found = read_plan(file)
    inspect(file)
    architecture = model(file.parent.parent / "config").architecture
    validate(found, architecture)
    assert found.dense(architecture).num_params > 0
    found.active_layers(architecture.num_layers)


def table(file: Path) -> None:
    found = read_table(file)
    inspect(file)
    architecture = model(file.parent.parent / "config").architecture
    assert found.noise >= 0
    assert found.suspects is not None
    dense = SubnetPlan.full(architecture).dense(architecture)
    found.latency(dense)
    found.predict(dense, "e2e", 90)


def artifact(file: Path) -> None:
    inspect(file.parent)
    found = read_manifest(file.parent)
    found.to_text()
    assert found.architecture().axis_size("query")
    verify_checksums(file.parent)


def provenance(file: Path) -> None:
    found = read_manifest(file.parent)
    entries = [entry for entry in found.files if entry.path != file.name]
    if problems := provenance_problems(file, found.inputs, entries, found.provenance(entries)):
        raise NotAsWritten(file.parent, problems)


def quality(file: Path) -> None:
    found = read_quality(file)
    found.differences([MODEL])
    assert found.metric
    sorted(found.values.items())
    pareto(found.shapes)
    found.write(file)


def report(file: Path) -> None:
    found = read_report(file)
    assert found.exit_code >= 0
    write_reports(found, file.parent)


def lock(file: Path) -> None:
    architecture = model(file.parent.parent / "config").architecture
    for entry in read_lock(file).values():
        validate(entry.plan, architecture)


def recipe(file: Path) -> None:
    found = load_recipe(file)
    assert 0 < found.depth.removed_of(30) < 2**31
    assert found.identity


def target(file: Path) -> None:
    found = read_target(str(file))
    parse_options(found)
    graph_options(found, found.dtype)


def tasks(file: Path) -> None:
    task_names(read_tasks(file))


def documents(file: Path) -> None:
    read_documents(DataRecipe(file=str(file)))


def choices(file: Path) -> None:
    for question in read_questions(DataRecipe(file=str(file), kind="choices")):
        question.prompt.encode()


class Letters:
    """A tokenizer of one token a letter."""

    eos_token = "."
    chat_template = None

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        return list(text.encode())


def training(file: Path) -> None:
    read_examples(file, Letters(), max_length=64, prompt="alpaca")


def build(file: Path) -> None:
    read_config(file)


def inspect(path: Path) -> None:
    """The command, in both of its forms."""
    with contextlib.redirect_stdout(io.StringIO()):
        for as_json in (True, False):
            cli.inspect(path, as_json=as_json)


READERS = {
    "config": Reader("config/config.json", supernet, "json"),
    "generation": Reader("config/generation_config.json", supernet, "json"),
    "weights": Reader("weights/model.safetensors", weights, "safetensors"),
    "index": Reader("index/model.safetensors.index.json", weights, "json"),
    "adconf": Reader("adapter/adapter_config.json", adapter, "json"),
    "adsafe": Reader("adapter/adapter_model.safetensors", adapter, "safetensors"),
    "adbin": Reader("pickled/adapter_model.bin", adapter, "zip"),
    "smolconf": Reader("smol/adapter_config.json", smol, "json"),
    "smolsafe": Reader("smol/adapter_model.safetensors", smol, "safetensors"),
    "npy": Reader("npy/dp_selection_strategy.npy", upstream, "npy"),
    "strategy": Reader("strategy/strategy.safetensors", strategy, "safetensors"),
    "fixed": Reader("fixed/strategy.safetensors", strategy, "safetensors"),
    "refit": Reader("refit/refit.safetensors", refit, "safetensors"),
    "refitrecipe": Reader("refitrecipe/recipe.toml", refit_recipe, "toml"),
    "gguf": Reader("gguf/model.gguf", gguf, "gguf"),
    "tokenizer": Reader("tokenizer/tokenizer.json", tokenizer, "json"),
    "tokconf": Reader("tokenizer/tokenizer_config.json", tokenizer, "json"),
    "plan": Reader("plan/plan.json", plan, "json"),
    "table": Reader("table/table.json", table, "json"),
    "manifest": Reader("artifact/amoeba.json", artifact, "json"),
    "provenance": Reader("artifact/provenance.json", provenance, "json"),
    "quality": Reader("quality/quality.json", quality, "json"),
    "report": Reader("report/build-report.json", report, "json"),
    "lock": Reader("lock/amoeba.lock", lock, "toml"),
    "recipe": Reader("recipe/recipe.toml", recipe, "toml"),
    "target": Reader("target/target.toml", target, "toml"),
    "recorded": Reader("recorded/target.toml", target, "toml"),
    "tasktoml": Reader("tasktoml/tasks.toml", tasks, "toml"),
    "build": Reader("build/amoeba.toml", build, "toml"),
    "documents": Reader("documents/data.jsonl", documents, "jsonl"),
    "choices": Reader("choices/data.jsonl", choices, "jsonl"),
    "training": Reader("training/data.jsonl", training, "jsonl"),
    "tasks": Reader("tasks/data.jsonl", tasks, "jsonl"),
}
