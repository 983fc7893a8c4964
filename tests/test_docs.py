"""Every command of README.md and docs/ runs, in the order of the page, in a checkout with nothing else in it.

A block ```sh holds commands for any machine, ```console what only a cluster or a GPU can do, and a block ```yaml
that begins with "# PATH.yaml" is the content of that file. docs/results/ holds records, and is not tested.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from powertrain.train.config import setting_names

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)

# The models are smaller than what the pages train; steps, tokens, batches and schedules are theirs, but on two ranks
# and in sweeps. A check that has passed in the checkout is not repeated: it depends on nothing that changes there.
SMALLER = (
    "model.hidden_size=16 model.intermediate_size=24 model.num_hidden_layers=1 model.num_attention_heads=2 "
    "model.num_key_value_heads=null model.vocab_size=512 data.tokenizer.vocab_size=512 threads=1"
)
PRELUDE = f"""
set -euo pipefail
trap 'echo "FAILED: $BASH_COMMAND"' ERR
smaller="{SMALLER}"
shorter="run.tokens=40_960 schedule.warmup_tokens=4_096 schedule.decay.tokens=8_192"
larger_batches="sweep.batch=[0.25,0.5] sweep.tokens=[122_880,184_320,245_760] sweep.min_steps=50"  # fewer steps
# Dense, so there is one Trainer and not one for each implementation of experts, which test_bench.py tries.
one_shape="+experiment=proxy_tiny batch.sequences=2 batch.micro_sequences=2 --rounds 1 --steps 1"
once() {{
    grep -qxF -- "$*" passed 2>/dev/null || {{ command powertrain "$@" && echo "$*" >> passed; }}
}}
powertrain() {{
    case "$*" in
        *--cfg*|*--help*) command powertrain "$@" ;;
        train*) command powertrain "$@" $smaller ;;
        *sweep=compare*) command powertrain "$@" 'sweep.tokens=[61_440]' 'sweep.batch=[0.125]' ;;  # an eighth of it
        *sweep=lean*) command powertrain "$@" $larger_batches ;;
        bench*) command powertrain "$@" $one_shape ;;
        check\\ coordinates*) once "$@" batch.sequences=2 ;;
        check\\ batch*|check\\ mup*|estimate*) once "$@" ;;
        *) command powertrain "$@" ;;
    esac
}}
accelerate() {{
    case "$*" in  # two ranks share a core or two with other tests
        *"num_processes 2"*) command accelerate "$@" $smaller $shorter ;;
        *) command accelerate "$@" $smaller ;;
    esac
}}
pip() {{ case "$*" in *-e\\ *|*--editable*) true ;; *) command pip "$@" ;; esac; }}  # it is installed already
make() {{ case "$1" in train) accelerate launch train.py +experiment=quickstart ;; test*) true ;; *) false ;; esac; }}
export -f once powertrain accelerate pip make
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this project, and the corpora that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs") / "powertrain"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", "*.egg-info", "results")
    shutil.copytree(ROOT, folder, ignore=ignored)
    text = [" ".join(f"word{number * k % 89}" for k in range(200)) for number in range(400)]
    for name in ("corpus/books", "addresses/train", "addresses/validation"):
        (folder / name).mkdir(parents=True)
        for number in range(40):
            (folder / name / f"{number}.txt").write_text(text[number])
    (folder / "corpus/web.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in text))
    return folder


def run_page(page: Path, folder: Path) -> None:
    for _, text in BLOCK.findall(page.read_text()):
        if named := re.match(r"(?:# @package \S+\n)?# (\S+\.yaml)\n", text):
            (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / named[1]).write_text(text)
    found = [
        f"command python - <<'END'\n{text}END\n" if language == "python" else text
        for language, text in BLOCK.findall(page.read_text())
        if language in ("sh", "python")
    ]
    script = PRELUDE + "\n".join(found)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["XDG_CACHE_HOME"] = environment["HOME"] = str(folder / "home")
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, checkout: Path) -> None:
    run_page(page, checkout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_and_file_of_a_page_is_there(page: Path) -> None:
    text = page.read_text()
    anchors = {re.sub(r"[^\w -]", "", line.strip("# ")).lower().replace(" ", "-") for line in text.splitlines()}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists() if path else anchor in anchors, target
    assert not re.search(r"^[ \t]+```sh|^[ \t]*~~~|^```sh[^\n]", text, re.M)  # which would not be run
    assert {language for language, _ in BLOCK.findall(text)} <= {"sh", "console", "yaml", "python"}


def test_make_help_lists_every_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    command = ["make", "--no-print-directory", "help"]  # which `make test` would have it print
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[1] for line in lines] == phony.split()
    assert all(len(line.split()) > 2 for line in lines)


def test_the_page_of_settings_is_what_the_code_says() -> None:
    """`python docs/settings.py > docs/settings.md` makes it; a setting without a comment is a KeyError there."""
    page = runpy.run_path(str(ROOT / "docs/settings.py"))["page"]()
    assert page == (ROOT / "docs/settings.md").read_text()
    told = set(re.findall(r"^\| `([\w.]+)` \| (?!\|)", page, re.M))
    leaves = {name for name in setting_names() if not any(other.startswith(f"{name}.") for other in setting_names())}
    assert leaves - told == {"schedule"}  # of which each schedule has its own
    # By hand, one of each kind.
    assert (
        "| `evaluation.every` | `0` | steps between evaluations, the first before step 1; 0: at the end only |" in page
    )
    assert "| `data.corpora.NAME.field` | `text` | the key or column that holds the text" in page
    assert "| `schedule.warmup_tokens` | `1_000_000_000` | length of the warmup (N_w) |" in page
    assert "| `engine.expect` | `null` | one of plain, ddp, zero1, zero2, zero3: refuse" in page
    assert "| `run.tokens` | **needed** |" in page
