"""A tokenizer is what its tokenizer.json says, by the word of the `tokenizers` and `sentencepiece` libraries."""

import functools
import json
import sysconfig
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from powertrain.data import DataError
from powertrain.data.prepare import TokenizerSpec, prepare
from powertrain.data.sources import Corpus
from powertrain.data.tokenizer import SAMPLE, load_tokenizer, save_tokenizer

END = "<|endoftext|>"
TEXT = (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_text(encoding="utf-8")
TEXTS = (TEXT[:2000], SAMPLE, f"import os\n    return{END}</s> 2024 [PAD]", "")


@functools.cache
def trained():
    """Digits one by one, as the tokenizer of GraniteMoe has it, over a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[END, "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "10 100 1000 10000"] * 9, trainer)
    return tokenizer.to_str()


def tokenizer_json(normalizer=None):
    tokenizer = Tokenizer.from_str(trained())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def written(folder, tokenizer, config, **files):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def assert_the_file_is_used(folder, again):
    """By `load_tokenizer`, and by anyone's AutoTokenizer from what is saved of it."""
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.no_truncation()
    file.no_padding()
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, again)
    for loaded in (tokenizer, load_tokenizer(again), AutoTokenizer.from_pretrained(again)):
        for text in TEXTS:
            for special in (True, False):
                expected = file.encode(text, add_special_tokens=special).ids
                assert loaded.encode(text, add_special_tokens=special, verbose=False) == expected
            assert loaded.decode(expected) == file.decode(expected, skip_special_tokens=False)
        assert loaded.eos_token == END
    return tokenizer


# Each but the last two rebuilds what a tokenizer.json has, or cannot be built from it.
@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "Qwen2Tokenizer", "CodeLlamaTokenizer", "BertTokenizer", "LlamaTokenizerFast", None]
)
def test_b1_the_class_that_is_named_changes_nothing(name, tmp_path):
    folder = written(tmp_path / "theirs", tokenizer_json(normalizers.NFKC()), {"tokenizer_class": name} if name else {})
    assert_the_file_is_used(folder, tmp_path / "again")


def test_b1_nor_do_tokens_and_flags_that_the_configuration_adds(tmp_path):
    flags = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": False}
    for number, (config, files) in enumerate(
        [
            ({"added_tokens_decoder": {"500": {"content": "return", **flags}}}, {}),
            ({"extra_special_tokens": ["import"], "pad_token": "[PAD]"}, {}),
            ({"split_special_tokens": True, "clean_up_tokenization_spaces": True}, {}),
            ({"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}, {}),
            ({}, {"added_tokens": {"return": 500}}),
            ({}, {"special_tokens_map": {"additional_special_tokens": ["import"]}}),
        ]
    ):
        folder = written(
            tmp_path / str(number), tokenizer_json(), {"tokenizer_class": "GPT2Tokenizer", **config}, **files
        )
        tokenizer = assert_the_file_is_used(folder, tmp_path / f"again{number}")
        assert len(tokenizer) == 500 and tokenizer.pad_token is None


def test_b1_what_the_file_has_beside_its_vocabulary_is_kept(tmp_path):
    file = tokenizer_json()
    file.add_tokens([AddedToken("return", normalized=False), AddedToken("    ", single_word=True)])
    file.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    file.enable_truncation(16)
    file.enable_padding(pad_token=END, length=64)
    folder = written(tmp_path / "theirs", file, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>"})
    tokenizer = assert_the_file_is_used(folder, tmp_path / "again")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert "token_type_ids" not in tokenizer("a")


def test_b1_preparation_uses_the_file(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT + SAMPLE)
    folder = written(tmp_path / "theirs", tokenizer_json(), {"tokenizer_class": "GPT2Tokenizer"})
    prepared = prepare({"a": Corpus("text", str(tmp_path / "a.txt"))}, TokenizerSpec(str(folder)), tmp_path / "cache")
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT + SAMPLE).ids
    assert prepared.train["a"].tokens.tolist() == [*expected, 0]
    anyones = AutoTokenizer.from_pretrained(prepared.tokenizer_folder)
    assert anyones.encode(TEXT + SAMPLE) == expected


def test_the_class_names_the_end_of_text_where_the_configuration_does_not(tmp_path):
    folder = written(tmp_path / "gpt2", tokenizer_json(), {})
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert assert_the_file_is_used(folder, tmp_path / "again").eos_token_id == 0


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", None])
def test_b1_a_sentencepiece_model_is_converted_to_the_same_tokens(kind, name, tmp_path):
    """Its own normalizer (NFKC, white space made one) included, which the class of Llama would leave out."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    folder = tmp_path / "theirs"
    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_prefix=str(folder / "tokenizer"), vocab_size=500,
        model_type=kind, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    config = {"eos_token": "</s>", "unk_token": "<unk>"} | ({"tokenizer_class": name} if name else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, tmp_path / "again")
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text in (TEXT, SAMPLE):
            assert loaded.encode(text, add_special_tokens=False) == expected.encode(text)


def test_b1_vocabulary_files_that_the_class_does_not_read_are_refused(tmp_path):
    """Transformers gives an empty tokenizer, and it would turn every text into unknown tokens or none."""
    tokenizer_json().model.save(str(tmp_path))  # vocab.json and merges.txt
    for name, read in [("GPT2Tokenizer", True), ("T5Tokenizer", False), ("LlamaTokenizer", False), ("", False)]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "tokenizer_class": name or None}))
        if read:
            tokenizer = load_tokenizer(tmp_path)
            assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
        else:
            with pytest.raises(DataError, match=r"tokenizer\.json"):
                load_tokenizer(tmp_path)
