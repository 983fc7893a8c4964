"""Benchmarks: lm-eval's tasks, from its own datasets or from folders on disk, scored on any model of ours.

Raises:
    ConfigError: on import, where lm-eval is not installed.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import datasets
import numpy as np
import torch
from datasets import DatasetDict, load_from_disk

from powertrain.data import expand
from powertrain.train.errors import ConfigError

try:
    import lm_eval.api.task
    from lm_eval.api.group import AggMetricConfig, Group
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(
        f"Tasks are scored by lm-eval, which cannot be imported ({error}). Install it with "
        "`pip install 'powertrain[evaluate]'`, or from a checkout with `pip install -e '.[evaluate]'`."
    ) from error

if TYPE_CHECKING:
    from powertrain.train.config import Config
    from powertrain.train.engine import Engine
    from powertrain.train.state import State

# The benchmarks of tables 5 to 7 of arXiv 2408.13359. Table 5 compares 1B models without examples in the prompt, and
# adds the perplexity of Wikipedia; table 6 has the same six for 3B models, table 7 knowledge, maths and code. Numbers
# of few-shot examples are from the model cards of PowerLM-3B and PowerMoE-3B (5 for MMLU and GSM8K, 4 for MATH),
# which name lm-eval, acc_norm and, for BoolQ, acc. Their HumanEval and MBPP are bigcode-eval's; lm-eval's differ.
# That "ARC" is the mean of both halves, and MATH lm-eval's minerva_math, is our interpretation; neither source says.
_SIX = ("arc", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
PRESETS = {
    "table5": (*_SIX, "wikitext"),
    "table6": _SIX,
    "table7": ("mmlu", "gsm8k", "minerva_math", "humaneval", "mbpp"),
}
_FEWSHOT = {"mmlu": 5}  # where the preset's number is not lm-eval's own
# Datasets that have moved on the hub since folders were written by their names.
_FORMERLY = {"aps/super_glue/boolq": "boolq/*", "cais/mmlu": "hails/mmlu_no_train"}

datasets.disable_progress_bars()
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load(names: Sequence[str], data: Path | None = None) -> dict[str, Any]:
    """lm-eval's tasks with their datasets, as its TaskManager gives them.

    Args:
        names: tasks, groups or tags of lm-eval, `arc`, or PRESETS.
        data: folder of datasets DATA/NAME/CONFIG/SPLIT, each written by `datasets.save_to_disk`, NAME with or without
            the hub's owner; a missing split is not used, so a task without its test split is scored on the validation
            split. None: the hub, or its cache.

    Raises:
        ConfigError: a task that does not exist, or whose dataset or code is not there.
    """
    manager = _manager()
    names = list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))
    known = {*manager.all_tasks, "arc"}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *PRESETS], n=3)
            raise ConfigError(
                f"lm-eval has no task '{name}'." + (f" Did you mean {' or '.join(near)}?" if near else "")
            )
    data = data and Path(expand(data))
    if data is not None and not data.is_dir():
        raise ConfigError(f"The folder of datasets, {data}, does not exist.")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    failures = {}
    hub = contextlib.nullcontext()
    with hub if data is None else mock.patch.object(ConfigurableTask, "download", _from(data)):
        for name in names:
            try:
                found = manager.load(_arc(manager) if name == "arc" else name)
            except Exception as error:  # the hub's, the dataset's, or a task's own code: whatever it raises
                failures[name] = str(error).partition("\n")[0].rstrip(". ") or type(error).__name__
                continue
            for task in found["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", _FEWSHOT.get(name, 0))
                task.set_fewshot_seed(1234)  # lm-eval's own
            for part, entries in loaded.items():
                entries |= found[part]
    if failures:
        left = [name for name in names if name not in failures]
        raise ConfigError(
            f"Not all tasks can be scored here. {'; '.join(f'{name}: {why}' for name, why in failures.items())}. "
            + (f"To exclude them name the others: {' '.join(left)}. " if left else "")
            + ("" if data else "Their datasets come from the hub unless a folder of them is given.")
        )
    return loaded


@functools.cache
def _manager() -> TaskManager:
    return TaskManager()  # reads thousands of small files


def _arc(manager: TaskManager) -> Group:
    """Both halves of ARC as one entry, of which the average is taken."""
    averages = [AggMetricConfig(metric=name, weight_by_size=False) for name in ("acc", "acc_norm")]
    group = Group("arc", aggregate_metric_list=averages)
    for task in manager.load(["arc_easy", "arc_challenge"])["tasks"].values():
        group.add(task)
    return group


def _from(data: Path) -> Any:
    """What replaces a task's download: its dataset from the folder `data`."""

    def download(task: ConfigurableTask, dataset_kwargs: Any = None, **_: Any) -> None:
        config = task.config
        path, name = str(config.dataset_path), config.dataset_name or "*"
        former = _FORMERLY.get(path, "")
        patterns = [
            f"{path}/{name}",
            f"{path.rpartition('/')[2]}/{name}",
            _FORMERLY.get(f"{path}/{name}", f"{former}/{name}"),
        ]
        found = [folder for pattern in patterns for folder in sorted(data.glob(pattern.lstrip("/"))) if folder.is_dir()]
        if not found:
            raise FileNotFoundError(f"{data} has no folder {' or '.join(patterns[:2])}")
        splits = {
            split.name: load_from_disk(str(split), keep_in_memory=True)
            for split in found[0].iterdir()
            if split.is_dir()
        }
        for split, rows in splits.items():
            if (
                config.dataset_name == "boolq" and "label" not in rows.column_names
            ):  # the original BoolQ, not SuperGLUE's
                splits[split] = rows.add_column("label", [int(answer) for answer in rows["answer"]])
        for role in ("training_split", "validation_split", "test_split"):
            if getattr(config, role) not in splits:
                setattr(config, role, None)
        if not config.test_split and not config.validation_split:
            raise FileNotFoundError(f"{found[0]} has neither a validation nor a test split")
        if (examples := task.fewshot_cfg.split) not in (None, *splits):
            raise FileNotFoundError(f"{found[0]} has no split '{examples}', where a prompt's examples come from")
        if config.process_docs is not None and task.fewshot_cfg.process_docs in (None, config.process_docs):
            # Once, or lm-eval would do it again at every pass over the questions.
            splits = {split: config.process_docs(rows) for split, rows in splits.items()}
            config.process_docs = task.fewshot_cfg.process_docs = None
        task.dataset = DatasetDict(splits)

    return download


class Scorer(HFLM):
    """lm-eval's Hugging Face model, from memory; in a run the engine's forward pass, shared by its ranks.

    Log-probabilities are taken in float32 whatever the precision of the weights. A continuation that is longer
    than the model's context, which HFLM refuses, is scored in pieces of half a context, each after the text that fits.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, engine: Engine | None = None) -> None:
        training = model.training
        # Contexts that requests share would make the number of batches differ between ranks.
        super().__init__(
            model,
            tokenizer=_as_text(tokenizer),
            batch_size=batch_size,
            softmax_dtype="float32",
            logits_cache=engine is None,
        )
        model.train(training)
        self.engine = engine

    def _model_call(self, inps: torch.Tensor, *unused: Any, **also_unused: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps) if self.engine is None else self.engine.logits(inps)
        return logits

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm or self.engine is not None)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
        pieces, owners = [], []
        for owner, (text, context, continuation) in enumerate(requests):
            length = len(continuation) if len(continuation) <= self.max_length else self.max_length // 2
            for start in range(0, len(continuation), length):
                pieces.append((text, context + continuation[:start], continuation[start : start + length]))
                owners.append(owner)
        scores = torch.zeros(len(pieces), 2, dtype=torch.float64)  # (log-probability, whether it is the likeliest text)
        if self.engine is None:
            scores[:] = torch.tensor(super()._loglikelihood_tokens(pieces, disable_tqdm, **options))
        else:
            ranks, rank = self.engine.world_size, self.engine.rank
            own = range(rank, len(pieces), ranks)
            # Equally many forward passes on every rank: sharded ranks run them together.
            share = [pieces[i] for i in own] + pieces[:1] * (-(-len(pieces) // ranks) - len(own))
            answers = super()._loglikelihood_tokens(share, disable_tqdm=True)
            scores[list(own)] = torch.tensor(answers[: len(own)], dtype=torch.float64)
            scores = self.engine.reduce(scores)
        answers = [(0.0, True)] * len(requests)
        for owner, (log_probability, likeliest) in zip(owners, scores.tolist(), strict=True):
            total, all_likeliest = answers[owner]
            answers[owner] = (total + log_probability, all_likeliest and bool(likeliest))
        return answers


def _as_text(tokenizer: Any) -> Any:
    """A copy that encodes a special token written in a text as plain text, as training data are encoded."""
    copied = copy.deepcopy(tokenizer)
    copied.split_special_tokens = True
    return copied


def score(
    scorer: Scorer,
    loaded: dict[str, Any],
    limit: int | None = None,
    bootstrap_iters: int = 0,
    run_code: bool = False,
) -> list[dict[str, Any]]:
    """A line for each task and group, a group before its members. Collective in a run; touches no random state.

    A line has `task`, `group` (the one that it is a member of, or None), metrics as lm-eval names them, `questions`,
    and `random`: the mean over the questions of 1 / number of choices, None where there are no choices.

    Args:
        limit: questions a task, the first ones.
        bootstrap_iters: 0 for no standard errors; most of them have a formula, and need no more than 1.
        run_code: consent to run what the model writes, which some tasks ask for.
    """
    quiet: Any = contextlib.nullcontext()
    if scorer.engine is not None:
        quiet = mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items)
    with quiet, _random_states_kept(scorer.device):
        results: Any = evaluate(
            scorer,
            loaded,
            limit=limit,
            log_samples=False,
            bootstrap_iters=bootstrap_iters,
            confirm_run_unsafe_code=run_code,
        )["results"]
    random_choice = {name: _random_choice(task, limit) for name, task in loaded["tasks"].items()}
    for name, group in loaded["groups"].items():
        members = [task.task_name for task in group.get_all_tasks()]
        by_size = all(metric.weight_by_size for metric in group.aggregate_metric_list or ())
        weights = [results[member]["sample_len"] if by_size else 1 for member in members]
        chances = [chance for member in members if (chance := random_choice[member]) is not None]
        random_choice[name] = float(np.average(chances, weights=weights)) if len(chances) == len(members) else None
    groups = {member: name for name, members in loaded["group_map"].items() for member in members}

    def lines(names: Iterable[str]) -> Iterator[dict[str, Any]]:
        for name in names:
            line = {"task": name, "group": groups.get(name)}
            for key, value in results[name].items():
                metric, comma, by = key.partition(",")
                if comma and not isinstance(value, str):
                    line[metric if by == "none" else f"{metric},{by}"] = float(value)
            yield {**line, "questions": results[name]["sample_len"], "random": random_choice[name]}
            yield from lines(loaded["group_map"].get(name, ()))

    return list(lines(name for name in (*loaded["groups"], *loaded["tasks"]) if name not in groups))


def _random_choice(task: Any, limit: int | None) -> float | None:
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    documents = task.doc_iterator(rank=0, limit=limit, world_size=1)
    return float(np.mean([1 / len(task.doc_to_choice(document)) for _, document in documents]))


class Benchmarks:
    """The tasks of a run (`evaluation.tasks`), loaded before it begins and scored with the model in memory."""

    def __init__(self, config: Config, engine: Engine) -> None:
        """Collective.

        Raises:
            ConfigError: a task that cannot be loaded, or that a run cannot score.
        """
        self.config, self.engine = config, engine
        names, data = config.evaluation.tasks, config.evaluation.data
        first: list[dict[str, Any]] = []
        # The others find in the cache what the first one has downloaded.
        engine.first_rank_decides(lambda: first.append(load(names, Path(data) if data else None)))
        self.loaded = first[0] if first else load(names, Path(data) if data else None)
        if writing := [name for name, task in self.loaded["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]:
            raise ConfigError(
                f"evaluation.tasks: {', '.join(writing)} have the model write text, which a run does not wait for. "
                "Exclude them here; `powertrain evaluate` scores them on the exported model."
            )
        if taken := {*self.loaded["tasks"], *self.loaded["groups"]} & {*config.data.corpora, "overall"}:
            raise ConfigError(f"evaluation.tasks: '{min(taken)}' is also a corpus of this run; rename the corpus.")

    def evaluate(self, tokenizer: Any, state: State) -> list[dict[str, Any]]:
        """Lines for evals.jsonl, a group as one. Collective; touches nothing that is trained, and no random state."""
        scorer = Scorer(self.engine.model, tokenizer, self.config.batch.micro_sequences, self.engine)
        return [
            {"step": state.step, "tokens": state.tokens, "corpus": line.pop("task"), **line}
            for line in score(scorer, self.loaded, self.config.evaluation.limit)
            if line.pop("group") is None
        ]


@contextlib.contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
