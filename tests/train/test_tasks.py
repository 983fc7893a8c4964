"""Benchmarks: from folders on disk, in a run and beside it."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_run, launch, without_timing

from powertrain.train.errors import ConfigError
from powertrain.train.track import read_lines

TASKS = ("piqa", "arc_easy", "boolq", "hellaswag")

pytestmark = pytest.mark.usefixtures("few_tasks")


def test_scores_touch_nothing(run: Callable[..., Path], benchmarks: Path) -> None:
    """With dropout, so that a random number more or less would show in every loss after it."""
    common = ("model.attention_dropout=0.2", "checkpoint.every=4")
    without = run("run.name=without", *common)
    judging = (f"evaluation.tasks=[{','.join(TASKS)}]", f"evaluation.data={benchmarks}", "evaluation.every=5")
    judged = run("run.name=judged", *common, *judging)
    assert_same_run(without, judged)

    lines = read_lines(judged / "evals.jsonl")
    assert [(line["step"], line["corpus"]) for line in lines] == [
        (step, corpus) for step in (0, 5, 10, 12) for corpus in sorted((*TASKS, "overall", "words"))
    ]
    assert read_lines(without / "evals.jsonl") == [
        line for line in lines if line["step"] == 12 and line["corpus"] in ("overall", "words")
    ]
    last = {line["corpus"]: line for line in lines[-6:]}
    assert last["piqa"]["random"] == 0.5
    assert last["arc_easy"]["random"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert last["hellaswag"]["questions"] == 24


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_scores_as_lm_eval_does_its_export(
    run: Callable[..., Path], benchmarks: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer's log-probability, where lm-eval loads the exported model by itself."""
    from lm_eval.models.huggingface import HFLM

    from powertrain.train import tasks

    asked: list[tuple[Any, Any]] = []

    def remembered(scorer: tasks.Scorer, requests: Any, disable_tqdm: bool = False) -> Any:
        answers = HFLM.loglikelihood(scorer, requests, disable_tqdm=True)
        asked.extend(zip(requests, answers, strict=True))
        return answers

    monkeypatch.setattr(tasks.Scorer, "loglikelihood", remembered)
    # No window is too short here: that is what lm-eval cannot do.
    settings = (f"evaluation.tasks=[{','.join(TASKS)}]", f"evaluation.data={benchmarks}", "evaluation.limit=9")
    folder = run(*settings, "model.max_position_embeddings=128", f"precision={precision}")
    assert len(asked) == 9 * (2 + 2 + 4) + 3 * (2 + 3 + 4)

    reference = HFLM(str(folder / "model"), device="cpu", batch_size=1, softmax_dtype="float32")
    expected = reference.loglikelihood([request for request, _ in asked], disable_tqdm=True)
    got = [answer for _, answer in asked]
    # In bf16 a product of several rows rounds otherwise than one of a single row.
    tolerance = 1e-4 if precision == "fp32" else 0.05
    assert [answer[0] for answer in got] == pytest.approx([answer[0] for answer in expected], abs=tolerance)
    if precision == "fp32":
        assert [answer[1] for answer in got] == [answer[1] for answer in expected]
    assert len({round(answer[0], 3) for answer in got}) > 50  # a model that tells answers apart


def test_an_answer_longer_than_the_window(small_config: Callable[..., Any], small_loss: Callable[..., Any]) -> None:
    """Pieces of half a window, each after what fits before it: the sum of single log-probabilities in float64."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from powertrain.train.tasks import Scorer

    vocabulary = {word: i for i, word in enumerate([*"abcdefghij", "<eos>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    model = small_loss(small_config()).model.eval()
    scorer = Scorer(model, tokenizer, batch_size=3)
    window = scorer.max_length
    assert window == 16
    draw = random.Random(0)
    context, answer = ([draw.randrange(10) for _ in range(n)] for n in (5, 37))
    [(got, _), (short, _)] = scorer._loglikelihood_tokens(
        [(("", ""), context, answer), (("", ""), context, answer[:3])], disable_tqdm=True
    )

    def expected(answer: list[int], piece: int) -> float:
        total = 0.0
        for start in range(0, len(answer), piece):
            ids = (context + answer[: start + piece])[-(window + 1) :]
            with torch.no_grad():
                logits = model.double()(torch.tensor([ids[:-1]])).logits.double()[0].log_softmax(-1)
            model.float()
            targets = answer[start : start + piece]
            total += sum(logits[len(ids) - 1 - len(targets) + i, target].item() for i, target in enumerate(targets))
        return total

    assert got == pytest.approx(expected(answer, window // 2), abs=1e-4)
    assert short == pytest.approx(expected(answer[:3], window), abs=1e-5)


def test_boolq_as_it_was_published(benchmarks: Path) -> None:
    """Its labels are booleans named `answer`; lm-eval's task wants numbers named `label`."""
    from datasets import load_from_disk

    from powertrain.train.tasks import load

    task = load(["boolq"], benchmarks)["tasks"]["boolq"]
    rows = load_from_disk(str(benchmarks / "boolq/none/validation"))
    choices = [task.doc_to_choice(row)[task.doc_to_target(row)] for row in task.eval_docs]
    assert choices == ["yes" if row["answer"] else "no" for row in rows]


def test_datasets_stay_as_they_are(benchmarks: Path) -> None:
    from powertrain.train.tasks import load

    before = sorted(benchmarks.rglob("*"))
    docs = load(["hellaswag"], benchmarks)["tasks"]["hellaswag"].eval_docs
    assert "query" in docs.column_names  # its documents are made from the rows, which datasets would keep beside them
    assert sorted(benchmarks.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("evaluation.tasks=[hellaswagg]",), "hellaswag"),
        (("evaluation.tasks=[piqa,arc_challenge]",), r"arc_challenge: .* has no folder .*name the others: piqa"),
        (("evaluation.tasks=[piqa]", "evaluation.limit=0"), "evaluation.limit is 0"),
        (("evaluation.tasks=[piqa]", "evaluation.data=/nowhere"), "/nowhere, does not exist"),
        (("evaluation.tasks=[piqa]", "data.corpora.piqa={source: text, path: x}"), "also a corpus"),
    ],
)
def test_a_run_that_cannot_be_judged_does_not_begin(
    run: Callable[..., Path], tmp_path: Path, benchmarks: Path, settings: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        run(f"evaluation.data={benchmarks}", *settings)
    assert not (tmp_path / "tiny/metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "precision"), [("ddp", "fp32"), ("zero3", "bf16")])
def test_ranks_share_the_questions(
    tiny: Callable[..., list[str]], tmp_path: Path, benchmarks: Path, engine: str, precision: str
) -> None:
    """23 questions of different lengths on 2 ranks: the same losses as without, and the scores of one process."""
    common = ("evaluation.every=6", f"precision={precision}", "model.attention_dropout=0.2")
    judging = (f"evaluation.tasks=[{','.join(TASKS)}]", f"evaluation.data={benchmarks}", "evaluation.limit=23")
    for name, settings in (("without", ()), ("judged", judging)):
        done = launch(tiny(f"run.name={name}", *common, *settings), ranks=2, engine=engine)
        assert done.returncode == 0, done.stderr
    lines, others = (without_timing(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("without", "judged"))
    assert lines == others

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from powertrain.train.tasks import Scorer, load, score

    folder = tmp_path / "judged/model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    alone = Scorer(model, AutoTokenizer.from_pretrained(folder), 4)
    expected = {line["task"]: line for line in score(alone, load(TASKS, benchmarks), 23)}
    for line in read_lines(tmp_path / "judged/evals.jsonl")[-6:]:
        if line["corpus"] in TASKS:
            for metric in ("acc", "acc_norm"):
                if metric in line:
                    # A question or two whose answers are equally likely but for the rounding.
                    slack = 1e-9 if precision == "fp32" else 2.01 / 23
                    assert line[metric] == pytest.approx(expected[line["corpus"]][metric], abs=slack)
