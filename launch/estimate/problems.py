"""Problems with the data, and with the machine."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from powertrain.data import DataError, expand
from powertrain.launch.estimate.cluster import Cluster
from powertrain.train.config import Config
from powertrain.train.console import human
from powertrain.train.errors import ConfigError


def data_problems(config: Config, console: Console) -> tuple[list[str], list[str]]:
    """Errors and warnings about corpora and tokenizer; print how often tokens are seen."""
    from powertrain.data import sources
    from powertrain.data.loader import num_sequences
    from powertrain.data.mixture import mixture_of
    from powertrain.data.order import Stage, epochs
    from powertrain.data.prepare import find, skipped_records
    from powertrain.data.tokenizer import load_tokenizer, rows_needed
    from powertrain.data.tokens import TokenFile

    errors: list[str] = []
    data = config.data
    if config.evaluation.tasks:
        from powertrain.train import tasks

        try:
            tasks.load(config.evaluation.tasks, Path(config.evaluation.data) if config.evaluation.data else None)
        except ConfigError as error:
            errors.append(f"evaluation.tasks: {error}")
    if not data.corpora:
        return errors, ["No data is named yet, so none was checked; training needs data=NAME, or corpora of your own."]
    for corpus in data.corpora.values():
        for path in (corpus.path, *([corpus.validation_path] if corpus.validation_path else [])):
            try:
                if corpus.source == "tokens":
                    TokenFile(expand(str(path)))
                else:
                    sources.files(dataclasses.replace(corpus, path=path, validation_path=None))
            except (DataError, OSError) as error:
                errors.append(str(error))
    if data.tokenizer.path is None and all(corpus.source == "tokens" for corpus in data.corpora.values()):
        errors.append(
            "All corpora are token files, which do not contain their tokenizer: name the tokenizer in "
            "data.tokenizer.path."
        )
    stages = config.stages()
    for _, mixture in stages:
        try:
            mixture_of(mixture)
        except DataError as error:
            errors.append(str(error))
    if errors:
        return errors, []
    try:
        found = find(data.corpora, data.tokenizer, data.cache_dir)
    except DataError as error:
        return [str(error)], []
    vocabulary, whose = data.tokenizer.vocab_size, "The tokenizer to be trained (data.tokenizer.vocab_size)"
    own = Path(expand(data.tokenizer.path)) if data.tokenizer.path is not None else None
    if folder := found.tokenizer_folder or (own if own is not None and own.is_dir() else None):
        vocabulary = rows_needed(load_tokenizer(folder))
        whose = f"The tokenizer in {folder}"
    elif data.tokenizer.path is not None:
        vocabulary = 0  # not known: it is on the hub
    if vocabulary > config.model.vocab_size:
        errors.append(
            f"{whose} has {vocabulary:,} tokens, and model.vocab_size is {config.model.vocab_size:,}: set "
            f"model.vocab_size to {vocabulary:,} or more."
        )
    length = data.sequence_length
    sequences = {}
    for name, file in found.train.items():
        try:
            sequences[name] = num_sequences(file.num_tokens, length, name)
        except DataError as error:
            errors.append(str(error))
    # What is not tokenised yet has at most one token a byte, unless it is compressed.
    for name in sorted(set(data.corpora) - set(found.train)):
        if data.corpora[name].source in ("stdlib", "text"):
            sequences[name] = sum(path.stat().st_size for path in sources.files(data.corpora[name])) // length
    warnings = [
        f"{name} is not prepared yet, so it is not known how often its tokens will be seen; `powertrain prepare` "
        "tokenises it."
        for name in data.corpora
        if name not in sequences and name not in found.train
    ]
    for name, folder in found.folders.items():
        if (folder / "validation.idx").exists() and (held_out := TokenFile(folder / "validation").num_tokens) <= length:
            warnings.append(
                f"The validation split of {name} has {held_out:,} tokens, fewer than the {length + 1:,} that one "
                "sequence takes: it will not be evaluated."
            )
    many = [skipped_records(name, folder) for name, folder in found.folders.items()]
    warnings += [sentence for _, sentence, is_warning in many if is_warning]
    if not errors and all(sequences.values()):
        seen = []
        rows = tuple(Stage(*stage) for stage in stages)
        for name, times in epochs(rows, sequences, -(-config.run.tokens // length)).items():
            size = human(sequences[name] * length)
            exactly = name in found.train
            seen.append(
                f"{name} {'' if exactly else 'at least '}{times:.2f} of {'' if exactly else 'at most '}{size} tokens"
            )
            if times > 1:
                has = f"has {size} tokens" if exactly else f"has at most {size} tokens, one a byte"
                warnings.append(f"{name} {has}, and the run sees them {times:.1f} times.")
        if seen:
            console.rule("data", align="left")
            console.print(f"epochs            {'; '.join(seen)}")
    return errors, warnings


def machine_problems(config: Config, cluster: Cluster, count: int) -> tuple[list[str], list[str]]:
    """Errors and warnings about kernels, disk, checkpoints and nodes; warnings where this is not the run's machine."""
    from powertrain.train.checkpoint import bytes_a_parameter
    from powertrain.train.model import granite

    errors: list[str] = []
    warnings: list[str] = []
    here = warnings if cluster.on_gpu else errors
    try:
        granite.check_kernels(config, "cuda" if cluster.on_gpu else "cpu")
    except ConfigError as error:
        here.append(f"On this machine: {error}" if cluster.on_gpu else str(error))
    folder = config.run_folder.absolute()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    size = bytes_a_parameter(config.average.window is not None) * count
    free, needed = shutil.disk_usage(folder).free, size * (config.checkpoint.keep + 1)
    if free < needed:
        here.append(
            f"{folder} has {decimal(free)} free, and {config.checkpoint.keep} checkpoints and one being written take "
            f"{decimal(needed)}. Free some, choose another run.folder, or a smaller checkpoint.keep."
        )
    if config.checkpoint.every == 0:
        warnings.append("checkpoint.every is 0: a run that fails before its end has saved nothing.")
    if cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node:
        errors.append(
            f"cluster.gpus {cluster.gpus} is no multiple of cluster.gpus_per_node {cluster.gpus_per_node}: "
            "launch/slurm/train.sbatch takes whole nodes."
        )
    return errors, warnings
