"""The verbs, as they are typed: what they print, where they write, and how they end."""

from __future__ import annotations

import gc
import gzip
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, launch

from powertrain.data.tokens import TokenWriter
from powertrain.launch.__main__ import VERBS
from powertrain.launch.check import CHECKS
from powertrain.train.imports import heavy_imports
from powertrain.train.track import read_lines


def verb(name: str, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"powertrain.launch.{name}").main(list(arguments))
    code = ended.value.code
    return code if isinstance(code, int) else 0


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(name, "--help") == 0
    assert "examples:" in capsys.readouterr().out


HEAVY = {
    *("torch", "transformers", "accelerate", "deepspeed", "tokenizers", "datasets"),
    *("lm_eval", "wandb", "matplotlib", "scipy"),
}
STATUS_AND_HEAVY = """
import importlib, json, sys
from pathlib import Path

heavy, commands, seen = *json.loads(sys.argv[1]), []
for command in commands:
    verb, *arguments = command.split()
    try:
        status = importlib.import_module(f"powertrain.launch.{verb}").main(arguments)
    except SystemExit as ended:
        status = ended.code
    seen.append([command, status, sorted(sys.modules.keys() & heavy)])
Path(sys.argv[2]).write_text(json.dumps(seen))
"""


def test_help_settings_and_refusals_do_not_wait_for_heavy_imports(tmp_path: Path) -> None:
    """Users wait for these imports, for seconds. All in one process: the first to import something is at fault."""
    done = [*(f"{name} --help" for name in VERBS), *(f"check {name} --help" for name in CHECKS)]
    done += ["train +experiment=quickstart --cfg", "completion bash"]
    refused = ["train +experiment=none", "train +experiment=quickstart run.tokens=-1", "prepare data=nowhere"]
    refused += [
        f"{name} +experiment=none" for name in ("check mup", "check batch", "check coordinates", "estimate", "bench")
    ]
    refused += ["sweep +sweep=none", "evaluate nowhere --text nowhere", "generate nowhere prompt", "check run nowhere"]
    refused += [f"{name} nowhere" for name in ("fit", "report", "export", "path")]
    given = json.dumps([sorted(HEAVY), done + refused])
    subprocess.run(
        [sys.executable, "-c", STATUS_AND_HEAVY, given, "seen"], cwd=tmp_path, capture_output=True, check=True
    )
    expected = [[command, 2 * (command in refused), []] for command in done + refused]
    assert json.loads((tmp_path / "seen").read_text()) == expected


def test_the_script_prints_its_help_without_heavy_imports() -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "--help"]
    traced = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    imported = {line.rpartition("|")[2].strip() for line in traced.splitlines()}
    assert "powertrain.train.cli" in imported
    assert not imported & HEAVY


def test_garbage_is_collected_again_after_heavy_imports_whatever_they_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # as in a process that has not imported it yet
    kept = []
    with pytest.raises(ImportError), heavy_imports():
        kept.append([kept])
        assert not gc.isenabled()
        raise ImportError
    try:
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
        assert not any(each is kept[0] for each in gc.get_objects())
    finally:
        gc.unfreeze()


def test_the_list_of_verbs_and_a_misspelt_one() -> None:
    command = [sys.executable, "-m", "powertrain.launch"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in listed for name in VERBS)
    wrong = subprocess.run([*command, "exprot"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Did you mean 'export'?" in wrong.stderr


def test_train_without_data_is_one_paragraph_and_status_2(tmp_path: Path) -> None:
    arguments = ["+experiment=quickstart", "data=none", f"run.folder={tmp_path}", "threads=1"]
    done = launch(arguments)
    assert done.returncode == 2
    assert "There is nothing to train on" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "quickstart/exit.json").read_text())["code"] == 2


def test_train_works_from_another_folder_through_accelerate(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train.py"), *tiny("run.folder=here")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "here/tiny/model/config.json").is_file()
    assert "<svg" in (tmp_path / "here/tiny/report.html").read_text()


def test_prepare_says_what_it_made(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("data=files", "data.corpora.files.source=text", f"data.corpora.files.path={words}/*.txt",
                 "data.corpora.files.validation_fraction=0.2",
                 "data.tokenizer.vocab_size=300", f"data.cache_dir={tmp_path}")  # fmt: skip
    assert verb("prepare", *arguments) == 0
    printed = capsys.readouterr().out
    assert "300 tokens: model.vocab_size=384, the next multiple of 128, has 84 rows of padding" in printed
    facts = json.loads(next(tmp_path.glob("files-*/corpus.json")).read_text())["splits"]["train"]
    assert f"train: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['bytes']:,} bytes" in printed
    epoch = (facts["tokens"] - 1) // 64 * 64
    assert verb("prepare", *arguments, "data.sequence_length=64") == 0
    assert f"an epoch, in sequences of data.sequence_length=64: files {epoch:,} tokens\n" in capsys.readouterr().out
    assert verb("prepare", *arguments, "data.sequence_length=64", f"run.tokens={3 * epoch}") == 0
    assert f"epochs in run.tokens={3 * epoch:,}: files 3.00\n" in capsys.readouterr().out
    assert verb("prepare", *arguments, "data.sequence_length=99999") == 0
    assert "Warning: files: fewer tokens than one sequence takes, 100,000" in capsys.readouterr().out
    assert verb("prepare", "data=files") == 2
    assert verb("prepare", *arguments, "data.workers=0") == 2
    assert "data.workers is 0" in capsys.readouterr().err


def mine(folder: Path, words: Path) -> Path:
    """A folder with data/mine.yaml: corpora of every kind of file, their weights, and a later stage."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    texts = [path.read_text() for path in sorted(words.glob("*.txt"))]
    lines = "".join(json.dumps({"content": f"{text} in a line"}) + "\n" for text in texts).encode()
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "lines.jsonl.zst").write_bytes(zstandard.compress(lines.replace(b"a line", b"a frame") + b"{}\n"))
    rows = pyarrow.table({"text": [f"{text} in a row" for text in [*texts, *texts[:20]]]})
    pyarrow.parquet.write_table(rows, folder / "rows.parquet")
    with pyarrow.ipc.new_stream(folder / "rows.arrow", rows.schema) as stream:
        stream.write_table(rows)
    with TokenWriter(folder / "megatron", np.uint16) as writer:
        for number in range(40):
            writer.add([*(number + np.arange(60)) % 290 + 1, 0])
    (folder / "data").mkdir()
    (folder / "data/mine.yaml").write_text(f"""
tokenizer: {{path: null, vocab_size: 300}}
corpora:
  books: {{source: text, path: "{words}/*.txt", validation_fraction: 0.2}}
  lines: {{source: jsonl, path: "{folder}/lines.jsonl.*", field: content, validation_fraction: 0.2}}
  rows: {{source: parquet, path: "{folder}/*.parquet", deduplicate: true, validation_fraction: 0.2}}
  arrows: {{source: arrow, path: "{folder}/*.arrow", validation_fraction: 0.2}}
  theirs: {{source: tokens, path: "{folder}/megatron"}}
mixture: {{books: 1, lines: 2, rows: 1, theirs: 1}}
stages:
  - {{from_tokens: 1536, mixture: {{books: 1, arrows: 3}}}}
""")
    return folder


def test_corpora_of_all_kinds_in_one_file_are_prepared_inspected_and_trained_on(
    words: Path, tmp_path: Path, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mine(tmp_path, words)
    ours = (f"--config-dir={folder}", "data=mine", f"data.cache_dir={tmp_path}/cache")
    assert verb("prepare", *ours, "data.sequence_length=64", "--inspect") == 0
    printed = capsys.readouterr().out
    sections = {name: printed.split(f"\n{name}  ")[1] for name in ("books", "lines", "rows", "arrows", "theirs")}
    assert "skipped, missing_field: 1, the first " + f"{tmp_path}/lines.jsonl.zst:61" in sections["lines"]
    assert "skipped, duplicate: 20" in sections["rows"].split("\narrows  ")[0]
    assert "skipped, " not in sections["arrows"]
    assert "train: 40 documents, 2,440 tokens\n" in sections["theirs"]
    assert "tokens a document: shortest 61, 10% 61, median 61" in sections["theirs"]
    assert "longer than a sequence of 64: 0.0% of documents" in sections["theirs"]
    assert "about" in sections["theirs"] and "about" not in sections["arrows"].split("\ntheirs  ")[0]
    for name, section in sections.items():
        assert "<|endoftext|>┃end of document┃\n" in section, name
    assert verb("prepare", *ours, "data.sequence_length=64", "--inspect") == 0
    assert capsys.readouterr().out.partition("\ntokenizer")[2] in printed  # the same places again

    trained = run(*ours, "run.name=mine", "model.vocab_size=320")
    assert "vocab_size 320, of which the tokenizer uses 300: 20 rows are padding" in capsys.readouterr().out
    lines = read_lines(trained / "evals.jsonl")
    assert {line["corpus"] for line in lines} == {
        "words",
        "books",
        "lines",
        "rows",
        "arrows",
        "overall",
    }  # words is tiny's


def test_export_of_an_earlier_step_and_generation(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("checkpoint.every=4", "checkpoint.keep=5")
    assert verb("export", str(folder), "--step", "4", "--out", str(tmp_path / "four")) == 0
    assert "tokens | 1,024" in (tmp_path / "four/README.md").read_text()
    assert verb("export", str(folder), "--step", "5") == 2
    assert "it has those of steps [4, 8, 12]" in capsys.readouterr().err
    assert verb("export", str(folder), "--out", str(tmp_path)) == 2  # somebody's folder, not a model
    for model in (tmp_path / "four", folder):
        assert verb("generate", str(model), "abc", "--max-new-tokens", "3") == 0
        said = capsys.readouterr()
        assert said.out.splitlines()[-1].startswith("abc") and "Warning" not in said.err
    assert verb("export", str(folder), "--step", "8", "--out", str(folder / "model")) == 0
    capsys.readouterr()
    assert verb("generate", str(folder), "abc") == 0
    assert "model is of step 8, and the run's newest checkpoint is of step 12" in capsys.readouterr().err
    assert verb("generate", str(tmp_path), "abc") == 2


def test_check_mup_prints_every_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("check", "mup", "model.num_experts_per_tok=1") == 0
    printed = capsys.readouterr().out
    assert "Warning: model.num_experts_per_tok is 1" in printed
    assert "model.layers.3.block_sparse_moe.experts.down_proj" in printed
    assert "logits_scaling = 0.5" in printed


def test_check_mup_prints_the_weight_decay_that_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Rate × decay is the same for all roles: at m_width 2 the rate of inner matrices is halved."""
    assert verb("check", "mup", "model.hidden_size=512", "optimizer.weight_decay_mode=independent") == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = {row[0].strip(): (float(row[5]), float(row[6])) for row in rows}
    assert cells["model.layers.0.self_attn.q_proj.weight"] == (0.5, 0.2)
    assert cells["model.embed_tokens.weight"] == (1, 0.1)
    assert cells["model.norm.weight"][1] == 0


def test_check_batch_can_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("check", "batch") == 0
    from powertrain.train.balance import Balance

    original = Balance._frequency

    def of_this_micro_batch(self: Balance, assignments: object) -> object:
        self.config.scope = "micro"
        return original(self, assignments)  # type: ignore[arg-type]

    monkeypatch.setattr(Balance, "_frequency", of_this_micro_batch)
    assert verb("check", "batch") == 1
    assert "FAIL: `lagged` has to agree" in capsys.readouterr().out


def test_an_unknown_check_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("check", "coordinate") == 2
    assert "invalid choice: 'coordinate'" in capsys.readouterr().err


def test_an_export_replaces_nothing_but_an_export(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    (mine / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to(mine)
    for out in (mine, mine / "new/..", tmp_path / "link"):
        assert verb("export", str(folder), "--out", str(out)) == 2
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert verb("export", str(folder)) == 0  # its own model folder again
