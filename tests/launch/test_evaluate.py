"""launch.evaluate: texts and benchmarks, against plain Transformers and lm-eval's own run."""

import gzip
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_overrides, train_here

from powertrain import train
from powertrain.launch import evaluate
from powertrain.train.errors import ConfigError


@pytest.fixture(scope="module")
def exported(words: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powertrain.train.report.runs_page", lambda folders: "not drawn")
        return train_here(tiny_overrides(words, cache, tmp_path_factory.mktemp("runs")))


def judge(*arguments: object) -> int:
    """The exit status of the verb."""
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_bits_per_byte(exported: Path, tmp_path: Path, words: Path) -> None:
    """Each token's log-probability by itself, in float64, after the context that the documented windows give it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "\n".join(path.read_text() for path in sorted(words.glob("*.txt"))[:3]) + "Straße, ½ € 語 🙂\r\n"
    plain, packed, short = tmp_path / "plain.txt", tmp_path / "packed.txt.gz", tmp_path / "short.txt"
    plain.write_bytes(text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    short.write_text("a")
    assert judge(exported, "--text", plain, packed, short, "--out", tmp_path / "out.json") == 0
    got, again, one = json.loads((tmp_path / "out.json").read_text())["text"]

    model = AutoModelForCausalLM.from_pretrained(exported / "model", experts_implementation="eager").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(exported / "model")
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
    window = model.config.max_position_embeddings
    assert len(ids) > 3 * window  # several windows
    nats = 0.0
    for target in range(1, len(ids)):
        begin = 0 if target <= window else math.ceil((target - window) / (window // 2)) * (window // 2)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:target]])).logits[0, -1].double()
        nats -= logits.log_softmax(-1)[ids[target]].item()
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert got["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert got["byte_perplexity"] == pytest.approx(2 ** got["bits_per_byte"])
    assert (got["bytes"], got["tokens"]) == (len(text.encode()), len(ids) - 1)
    assert {k: v for k, v in again.items() if k != "file"} == {k: v for k, v in got.items() if k != "file"}
    assert (one["bytes"], one["tokens"]) == (1, 1)


def test_a_text_is_encoded_as_it_is_for_training(exported: Path, words: Path, tmp_path: Path) -> None:
    """Against the tokens of a corpus of the same texts: with special tokens written in them, and unknown words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from powertrain.data.prepare import TokenizerSpec, prepare
    from powertrain.data.sources import Corpus

    model = AutoModelForCausalLM.from_pretrained(exported / "model")
    tokenizer = AutoTokenizer.from_pretrained(exported / "model")
    text = "ab <|endoftext|> cd<|endoftext|>" + "ab " * 200
    (tmp_path / "text.txt").write_text(text)
    corpus = Corpus("text", str(tmp_path / "text.txt"))
    trained_on = prepare({"a": corpus}, TokenizerSpec(str(exported / "model")), tmp_path / "cache").train["a"].tokens
    seen: list[int] = []

    def forward(input_ids: torch.Tensor, **options: Any) -> Any:
        seen.extend(input_ids[0].tolist())
        return model(input_ids=input_ids, **options)

    forward.config, forward.device = model.config, model.device  # type: ignore[attr-defined]
    got = evaluate.text_loss(forward, tokenizer, text.encode())
    assert got["tokens"] == len(trained_on) - 1
    assert seen[:20] == [tokenizer.eos_token_id, *trained_on[:19].tolist()]
    # lm-eval's side of it.
    from powertrain.train.tasks import Scorer

    assert Scorer(model, tokenizer, 1).tok_encode(text, add_special_tokens=False) == trained_on[:-1].tolist()
    assert tokenizer.eos_token_id in tokenizer.encode(text)  # the given one is as it was

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "ab": 1, "cd": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    unknown = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[UNK]")
    with pytest.raises(ConfigError, match="this text's 3 tokens 1 are unknown"):
        evaluate.text_loss(model, unknown, b"ab cd ef")


@pytest.mark.usefixtures("few_tasks")
def test_scores_are_lm_evals(exported: Path, benchmarks: Path, capsys: Any) -> None:
    """Its own entry point, given the stock task, the folder's rows and the exported model."""
    from datasets import DatasetDict, load_from_disk
    from lm_eval import simple_evaluate
    from lm_eval.tasks._yaml_loader import load_yaml

    from powertrain.train import tasks

    names = ["arc_easy", "boolq", "hellaswag"]
    assert judge(exported, "--tasks", *names, "--data", benchmarks, "--limit", 20) == 0
    result = exported / "model-evaluation.json"
    report = json.loads(result.read_text())
    result.unlink()
    printed = capsys.readouterr().out
    assert "float32 on cpu" in printed

    def rows(name: str) -> Any:
        found = load_from_disk(str(benchmarks / name / "validation"))
        return lambda **_: DatasetDict(train=found, validation=found)  # the stock tasks look for examples in the first

    yes_is_1 = {"doc_to_target": lambda row: int(row["answer"])}
    sources = {"arc_easy": "ai2_arc/ARC-Easy", "boolq": "boolq/none", "hellaswag": "hellaswag/none"}
    manager = tasks._manager()
    stock = []
    for name in names:
        entry = manager.task_index[name]
        description = load_yaml(entry.yaml_path, resolve_func=True)
        description |= {"custom_dataset": rows(sources[name]), "test_split": None}
        stock.append(description | (yes_is_1 if name == "boolq" else {}))
    expected = simple_evaluate(
        "hf",
        {"pretrained": str(exported / "model")},
        tasks=stock,
        limit=20,
        device="cpu",
        batch_size=4,
        task_manager=manager,
        log_samples=False,
    )
    assert expected is not None
    for line in report["tasks"]:
        for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
            assert line.get(metric) == pytest.approx(expected["results"][line["task"]].get(f"{metric},none"), abs=1e-12)
        assert f"{line['acc']:.4f}" in printed
        assert (line["split"], line["questions"], line["num_fewshot"]) == ("validation", 20, 0)
    best = [line.get("acc_norm", line["acc"]) for line in report["tasks"]]
    assert report["average"]["value"] == pytest.approx(sum(best) / 3)
    assert report["average"]["random"] == pytest.approx((report["tasks"][0]["random"] + 1 / 2 + 1 / 4) / 3)


@pytest.mark.usefixtures("few_tasks")
def test_what_cannot_be_judged(
    exported: Path, benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One paragraph, status 2, and nothing loaded or written."""
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe")
    empty.touch()
    text = tmp_path / "text"
    text.write_text("word")
    cut, bare = (Path(shutil.copytree(exported / "model", tmp_path / name)) for name in ("cut", "bare"))
    (cut / "model.safetensors").write_bytes((exported / "model" / "model.safetensors").read_bytes()[:-9])
    for file in bare.glob("tokenizer*"):
        file.unlink()
    pickled, foreign, kernel = (
        Path(shutil.copytree(exported / "model", tmp_path / name)) for name in ("pickled", "foreign", "kernel")
    )
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    description = json.loads((foreign / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (foreign / "config.json").write_text(json.dumps(description | own))
    (foreign / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    (kernel / "config.json").write_text(json.dumps(description | {"_attn_implementation": "somebody/kernel"}))
    for arguments, named in (
        ([pickled, "--text", text], "pickled cannot be loaded"),
        ([foreign, "--text", text], "foreign cannot be loaded"),
        ([kernel, "--text", text], "names the attention somebody/kernel"),
        ([cut, "--text", text], "cut cannot be loaded"),
        ([bare, "--text", text], "bare cannot be loaded"),
        ([exported], "--tasks or --text"),
        ([tmp_path, "--text", empty], "neither a model folder nor the folder of a run"),
        ([exported, "--text", binary], "not text in UTF-8"),
        ([exported, "--text", empty], "is empty"),
        ([exported, "--text", tmp_path / "nothing"], "nothing"),
        ([exported, "--tasks", "piqa", "arc", "--data", benchmarks], "name the others: piqa"),
        ([exported, "--tasks", "piqa", "--data", benchmarks, "--limit", 0], "--limit is 0"),
        ([exported, "--tasks", "piqa", "--data", benchmarks, "--out", tmp_path / "no/where.json"], "cannot be written"),
    ):
        assert judge(*arguments) == 2
        said = capsys.readouterr().err.strip()
        assert named in said and "\n" not in said, said
    assert not (exported / "model-evaluation.json").exists() and not (tmp_path / "mark").exists()


def test_without_lm_eval(
    exported: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Texts need none; tasks name the extra."""
    monkeypatch.delitem(sys.modules, "powertrain.train.tasks", raising=False)
    monkeypatch.delattr(train, "tasks", raising=False)
    for module in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert judge(exported, "--text", __file__, "--out", tmp_path / "out.json") == 0
    assert judge(exported, "--tasks", "piqa") == 2
    assert "powertrain[evaluate]" in capsys.readouterr().err
