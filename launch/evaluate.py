"""Evaluate a model: benchmarks by lm-eval beside random choice, and bits per byte of any text.

usage: powertrain evaluate MODEL [--tasks TASK …] [--data DIR] [--text FILE …] [--limit N] [--out FILE] …

examples:
  powertrain evaluate runs/quickstart --text README.md
  powertrain evaluate runs/quickstart --tasks arc boolq hellaswag openbookqa piqa winogrande --data datasets
  powertrain evaluate /models/PowerMoE-3b --tasks table6

A task is one of lm-eval's, or table5, table6 or table7: the benchmarks of these tables of arXiv 2408.13359.
docs/evaluation.md describes them, and the layout of dataset folders.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from powertrain.data.files import check_output
from powertrain.data.sources import decompressed
from powertrain.launch.generate import model_folder
from powertrain.launch.parser import verb_parser
from powertrain.train.cli import guard
from powertrain.train.errors import ConfigError
from powertrain.train.imports import heavy_imports

LONGEST_WINDOW = 4096  # tokens: the logits of a longer one would take tens of GiB


def main(arguments: list[str] | None = None) -> None:
    """Print a table, and write the same as JSON."""
    parser = verb_parser("evaluate", __doc__)
    parser.add_argument("model", type=Path, help="a model folder, or the folder of a run")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval's names, or table5, table6, table7"
    )
    parser.add_argument(
        "--data", type=Path, help="datasets on disk, DIR/NAME/CONFIG/SPLIT; default: lm-eval's, from the hub"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument(
        "--text", nargs="+", default=[], type=Path, metavar="FILE", help="texts in UTF-8, plain, .gz or .zst"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences at a time; default: 16")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: MODEL-evaluation.json beside the model folder; MODEL-text.json without tasks",
    )
    parser.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="run the code that the model writes, for humaneval and mbpp",
    )
    sys.exit(guard(lambda: _evaluate(parser.parse_args(arguments))))


def _evaluate(options: argparse.Namespace) -> int:
    # ---- everything that can be wrong is checked before the model is loaded
    folder = model_folder(options.model).resolve()
    # Separate files, so that scoring a text does not replace hours of benchmarks.
    out = options.out or folder.with_name(f"{folder.name}-{'evaluation' if options.tasks else 'text'}.json")
    if not options.tasks and not options.text:
        raise ConfigError("Nothing to evaluate: name --tasks or --text files, or both. --help shows examples.")
    for name, value in (("--limit", options.limit), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it is at least 1.")
    check_output(out)
    texts = {path: _read(path) for path in options.text}
    loaded: dict[str, Any] = {}
    if options.tasks:
        with heavy_imports():
            from powertrain.train import tasks

        loaded = tasks.load(options.tasks, options.data)
        unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe and not options.confirm_run_unsafe_code:
            raise ConfigError(
                f"{', '.join(unsafe)}: these tasks run code that the model has written, on this machine. Allow it with "
                "--confirm-run-unsafe-code, inside a container, or skip these tasks."
            )

    with heavy_imports():
        from powertrain.train.export import load, warn_if_outdated

    warn_if_outdated(folder)
    tokenizer, model = load(folder)
    report: dict[str, Any] = {
        "model": str(options.model),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    print(f"{options.model}: {report['parameters']:,} parameters, {report['dtype']} on {report['device']}")
    if options.text:
        report["text"] = [{"file": str(path), **text_loss(model, tokenizer, raw)} for path, raw in texts.items()]
        print(f"\n{'':<24} {'bits/byte':>10} {'nats/token':>10} {'tokens':>12} {'bytes':>12}")
        for line in report["text"]:
            print(
                f"{line['file'][-24:]:<24} {line['bits_per_byte']:>10.4f} {line['loss']:>10.4f} {line['tokens']:>12,} "
                f"{line['bytes']:>12,}"
            )
    if loaded:
        scorer = tasks.Scorer(model, tokenizer, options.batch_size)
        lines = tasks.score(scorer, loaded, options.limit, 1000, options.confirm_run_unsafe_code)
        report["versions"]["lm_eval"] = version("lm_eval")
        report |= {"limit": options.limit, "data": str(options.data) if options.data else "hub", "tasks": lines}
        for line in lines:
            if (task := loaded["tasks"].get(line["task"])) is not None:
                line["split"] = task.config.test_split or task.config.validation_split
                line["num_fewshot"] = task.config.num_fewshot
        report["average"] = _average(lines)
        _print_table(lines, report["average"])
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nresult  {out}")
    return 0


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        try:
            with decompressed(path, file) as whole:
                raw = whole.read()
            raw.decode()
        except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{path} is not text in UTF-8, plain or in a whole .gz or .zst file: {error}.") from error
    if not raw:
        raise ConfigError(f"{path} is empty; there is nothing to measure.")
    return raw


def text_loss(model: Any, tokenizer: Any, raw: bytes) -> dict[str, float]:
    """How well a model predicts a text: {bits_per_byte, loss, byte_perplexity, word_perplexity, tokens, bytes}.

    The whole text is encoded as training encodes a document, after a beginning-of-text token (or end-of-text, as in
    lm-eval) that is no target. Windows are as long as the model's positions, at most LONGEST_WINDOW; each
    begins half a window after the one before, and only targets that the one before did not have count. So every token
    is a target once, and all but those of the first half window see at least half a window.

    Args:
        raw: UTF-8; `bytes` is its length.

    Raises:
        ConfigError: the tokenizer has neither of these tokens, or cannot encode the whole text.
    """
    import torch

    from powertrain.data.tokenizer import as_text, encode

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError("The model's tokenizer has no tokenizer.json, and without one no model is trained here.")
    text = raw.decode()
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    backend = as_text(tokenizer.backend_tokenizer.to_str())
    encoded = encode(backend, text)
    # A special token written in the text is encoded as text, so these ids stand for unknown text alone.
    unknown = sum(map(encoded.count, {tokenizer.unk_token_id, _unknown_id(backend)}))
    if prefix is None or unknown or not encoded:
        raise ConfigError(
            f"Bits per byte cannot be computed with this tokenizer: of this text's {len(encoded):,} tokens {unknown:,} "
            f"are unknown, and its end-of-text token is {prefix}. It takes one with such a token that encodes any text."
        )
    ids = torch.tensor([prefix, *encoded])
    length = min(getattr(model.config, "max_position_embeddings", None) or LONGEST_WINDOW, LONGEST_WINDOW)
    nats, seen = 0.0, 0  # `seen` targets are counted already: ids[1 : seen + 1]
    with torch.no_grad():
        while seen < len(ids) - 1:
            begin = 0 if seen == 0 else seen - (length - max(1, length // 2))
            window = ids[begin : begin + length + 1].to(model.device)
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0, seen - begin :].float()
            nats += (
                torch.nn.functional.cross_entropy(logits, window[seen - begin + 1 :], reduction="none")
                .double()
                .sum()
                .item()
            )
            seen = begin + len(window) - 1
    tokens = len(ids) - 1
    return {
        "bits_per_byte": nats / math.log(2) / len(raw),
        "loss": nats / tokens,
        "byte_perplexity": math.exp(nats / len(raw)),
        "word_perplexity": math.exp(min(700.0, nats / max(1, len(text.split())))),
        "tokens": tokens,
        "bytes": len(raw),
    }


def _unknown_id(backend: Any) -> int | None:
    """The id that the tokenizer itself gives unknown text, whatever its configuration calls it."""
    model = json.loads(backend.to_str())["model"]
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else backend.token_to_id(token)


def _average(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Over the named tasks with choices, a group counting once: acc_norm if a task has it, else acc; random choice."""
    named = [line for line in lines if line["group"] is None and line["random"] is not None]
    if not named:
        return None
    values = [line.get("acc_norm", line.get("acc", math.nan)) for line in named]
    return {
        "tasks": [line["task"] for line in named],
        "value": math.fsum(values) / len(values),
        "random": math.fsum(line["random"] for line in named) / len(named),
    }


def _print_table(lines: list[dict[str, Any]], average: dict[str, Any] | None) -> None:
    heads = f"{'value':>9} {'±':>8} {'random':>8} {'questions':>10} {'split':>11} {'shots':>6}"
    print(f"\n{'task':<28} {'metric':<22} {heads}")
    described = ("task", "group", "questions", "random", "split", "num_fewshot")
    for line in lines:
        name = ("  " if line["group"] else "") + line["task"]
        for metric in [key for key in line if key not in described and "_stderr" not in key]:
            deviation = line.get(metric.replace(",", "_stderr,") if "," in metric else f"{metric}_stderr")
            chance = line["random"] if metric in ("acc", "acc_norm") else None
            cells = [f"{line[metric]:>9.4f}", *("" if v is None else f"{v:.4f}" for v in (deviation, chance))]
            print(
                f"{name:<28} {metric:<22} {cells[0]} {cells[1]:>8} {cells[2]:>8} {line['questions']:>10,} "
                f"{line.get('split', ''):>11} {line.get('num_fewshot', ''):>6}"
            )
            name = ""
    if average is not None:
        print(f"{'average':<28} {'acc_norm, else acc':<22} {average['value']:>9.4f} {'':>8} {average['random']:>8.4f}")


if __name__ == "__main__":
    main()
