"""lm-eval-harness (extra `eval`) on any `LanguageModel`: tasks by name, or from a folder of local task files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError, UnknownName, UnsupportedError
from amoeba_export.evaluate.choices import TaskScore
from amoeba_export.evaluate.likelihood import log_likelihoods
from amoeba_export.evaluate.model import LanguageModel
from amoeba_export.ir import SILENT, Progress


@dataclass(frozen=True, slots=True, eq=False)
class Harness:
    """Tasks that lm-eval knows, checked before anything runs.

    Attributes:
        tasks: Their names.
        manager: lm-eval's index of task files.
    """

    tasks: tuple[str, ...]
    manager: Any

    @classmethod
    def open(cls, tasks: Sequence[str], *, folder: Path | None = None) -> Harness:
        """Find the tasks.

        Args:
            tasks: Names of tasks or groups.
            folder: More task files (YAML), read before lm-eval's own.

        Raises:
            InputError: lm-eval is not installed.
            UnknownName: It has no such task.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise InputError(
                f"The tasks {', '.join(tasks)} need lm-eval, which is not installed.",
                next_step="Install it with: pip install 'amoeba-export[eval]', or give a .jsonl or .toml file.",
            ) from error
        manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else None
        if manager is None or not set(tasks) <= set(manager.all_tasks):  # its own thousands of files take seconds
            manager = TaskManager(include_path=str(folder) if folder else None)
        for task in tasks:
            if task not in manager.all_tasks:
                raise UnknownName("task", task, nearest_tasks(task, manager.all_tasks))
        return cls(tuple(tasks), manager)

    def score(
        self,
        model: LanguageModel,
        tokenizer: Any,
        *,
        max_length: int,
        limit: int | None = None,
        progress: Progress = SILENT,
    ) -> dict[str, TaskScore]:
        """Run every task on `model`.

        Args:
            model: What is scored.
            tokenizer: Of the model.
            max_length: Tokens that it can take.
            limit: The first so many items of each task.
            progress: Told of every batch of requests.

        Raises:
            UnsupportedError: A task that generates text, or has no accuracy.
        """
        import lm_eval

        results = lm_eval.simple_evaluate(
            model=_adapted(model, tokenizer, max_length, progress),
            tasks=list(self.tasks),
            task_manager=self.manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            verbosity="ERROR",
        )
        groups, samples = results.get("group_subtasks", {}), results["n-samples"]
        return {
            name: _score(
                name, results["results"][name], sum(samples[leaf]["effective"] for leaf in _leaves(name, groups))
            )
            for name in self.tasks
        }


def nearest_tasks(task: str, known: Sequence[str]) -> list[str]:
    """lm-eval has thousands of tasks: name the few that begin alike."""
    alike = [name for name in known if name.startswith(task[:3])]
    return sorted(alike)[:12] or ["a name from 'lm-eval ls tasks'"]


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, however deep; a task is its own."""
    return [leaf for child in groups[name] for leaf in _leaves(child, groups)] if groups.get(name) else [name]


def _score(name: str, result: Mapping[str, Any], num_items: int) -> TaskScore:
    accuracy = result.get("acc,none")
    if accuracy is None:
        raise UnsupportedError(
            f"The task {name} has no accuracy; it reports {', '.join(sorted(result))}.",
            next_step="Export the shape, and run lm-eval on the artifact's safetensors folder.",
        )
    return TaskScore.of(accuracy, result.get("acc_norm,none", accuracy), num_items)


def _adapted(model: LanguageModel, tokenizer: Any, max_length: int, progress: Progress) -> Any:
    """`model` as lm-eval wants it. A class made on demand: its base is an optional package."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapted(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            # As everywhere else: with the opening token, if the tokenizer adds one
            return list(tokenizer(string, add_special_tokens=add_special_tokens is not False)["input_ids"])

        def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            rows, starts = [], []
            for _, context, continuation in requests:
                tokens = [*context, *continuation][-max_length:]
                rows.append(tokens)
                starts.append(max(len(tokens) - len(continuation), 1))
            return list(log_likelihoods(model, rows, starts, progress=progress))

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = [
                    (None, *make_disjoint_window(window))
                    for window in get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                        prefix_token=self.eot_token_id,
                        max_seq_len=max_length - 1,
                        context_len=1,
                    )
                ]
                totals.append(sum(log_prob for log_prob, _ in self._loglikelihood_tokens(windows)))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            raise UnsupportedError(
                "This task lets the model write, and amoeba evaluate only scores given text.",
                next_step="Export the shape, and run lm-eval on the artifact's safetensors folder.",
            )

    return Adapted()
