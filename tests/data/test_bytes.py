"""How many bytes of text a token stands for: by its id, by offsets, or not known."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from powertrain import data
from powertrain.data.prepare import TokenizerSpec, prepare
from powertrain.data.sources import Corpus
from powertrain.data.tokenizer import as_text, bytes_of_tokens, encode

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXTS = [
    "the cat  sat, and Émile\u0301 ran\n",
    "  naïve <|endoftext|> cat ﬁn 😀 語\r\n\tthe ",
    "unseen words zzz\u0000 the cat",
    "<0x41>▁the cat E\u0301\u0301",
]


def byte_level(*, alphabet=ALPHABET, normalizer=None, extra=(), prefix=False) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet, "th", "the", "Ġthe", "Ġc"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "c")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    steps = [*extra, pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if extra else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def words(normalizer=None) -> Tokenizer:
    vocab = {"<|endoftext|>": 0, "[UNK]": 1, "the": 2, "cat": 3, "sat": 4, ",": 5, "and": 6}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<|endoftext|>", "[UNK]"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it."""
    pieces = ["<|endoftext|>", "<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "t", "h", "e", "th", "the"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate([*pieces, "▁the"])},
            [("t", "h"), ("th", "e"), ("▁", "the")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<|endoftext|>", "<unk>"])
    return tokenizer


def removing() -> Tokenizer:
    return byte_level(extra=[pre_tokenizers.Split(Regex(r"\s+"), "removed")])


def with_added(**options: bool) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("naïve", normalized=False, **options)])
    return tokenizer


KNOWN = {
    "bytes": byte_level,
    "digits apart": lambda: byte_level(extra=[pre_tokenizers.Digits(individual_digits=True)]),
    "an added word": with_added,
}
BY_OFFSETS = {
    "unknown words": words,
    "lower case": lambda: words(normalizers.Lowercase()),
    "NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "NFKC, stripped, no accents": lambda: byte_level(
        normalizer=normalizers.Sequence(
            [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Strip(), normalizers.Lowercase()]
        )
    ),
    "not all bytes": lambda: byte_level(alphabet=[c for c in ALPHABET if c not in "zÃ"]),
    "a space before": lambda: byte_level(prefix=True),
    "white space removed": removing,
    "byte fallback": byte_fallback,
    "an added word that takes space": lambda: with_added(lstrip=True),
}


def saved(tokenizer: Tokenizer, folder: Path) -> TokenizerSpec:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return TokenizerSpec(str(folder))


def prepared(tokenizer: Tokenizer, folder: Path, texts: list[str] = TEXTS):
    for name in ("train", "held"):
        (folder / name).mkdir()
        for number, text in enumerate(texts):
            (folder / name / f"{number}.txt").write_bytes(text.encode())
    corpus = Corpus("text", str(folder / "train/*"), validation_path=str(folder / "held/*"))
    return prepare({"a": corpus}, saved(tokenizer, folder / "tokenizer"), folder / "cache")


@pytest.mark.parametrize("kind", KNOWN)
def test_an_id_says_its_bytes(kind: str, tmp_path: Path) -> None:
    tokenizer = KNOWN[kind]()
    sizes = bytes_of_tokens(tokenizer.to_str())
    assert sizes is not None
    text_tokenizer = as_text(tokenizer.to_str())
    for text in TEXTS:
        ids = encode(text_tokenizer, text)
        assert sizes[ids].sum() == len(text.encode())
        for number in ids:
            alone = tokenizer.decode([number])
            if "\ufffd" not in alone:  # else a part of a character
                assert sizes[number] == len(alone.encode())
    assert sizes[0] == 0
    assert prepared(tokenizer, tmp_path).token_bytes == {}


@pytest.mark.parametrize("kind", BY_OFFSETS)
def test_offsets_say_the_bytes_that_an_id_does_not(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BY_OFFSETS[kind]()
    assert bytes_of_tokens(tokenizer.to_str()) is None
    found = prepared(tokenizer, tmp_path)
    file, counted = found.validation["a"], found.token_bytes["a"]
    bounds = [*file.document_starts.tolist(), file.num_tokens]
    assert [int(counted[a:b].sum()) for a, b in itertools.pairwise(bounds)] == [len(text.encode()) for text in TEXTS]
    # In pieces, where what one leaves over is the next one's.
    monkeypatch.setattr(data.tokenizer, "PIECE", 7)
    monkeypatch.setattr(data.encode, "BATCH", 11)
    (tmp_path / "pieces").mkdir()
    found = prepared(tokenizer, tmp_path / "pieces")
    file, counted = found.validation["a"], found.token_bytes["a"]
    bounds = [*file.document_starts.tolist(), file.num_tokens]
    assert [int(counted[a:b].sum()) for a, b in itertools.pairwise(bounds)] == [len(text.encode()) for text in TEXTS]


def test_unknown_words_count_as_they_are_written(tmp_path: Path) -> None:
    texts = [text.replace("\u0301", "") for text in TEXTS]  # which Python takes for no part of a word
    found = prepared(words(), tmp_path, texts)
    expected: list[int] = []
    for text in texts:
        reached = 0
        for word in re.finditer(r"\w+|[^\w\s]+", text):
            expected.append(len(text[reached : word.end()].encode()))
            reached = word.end()
        expected.append(len(text[reached:].encode()))  # the end of text
    assert found.token_bytes["a"].tolist() == expected
    assert (np.array(found.validation["a"].tokens) == 1).sum() > 5


def test_a_special_token_that_is_written_is_text(tmp_path: Path) -> None:
    tokenizer = byte_level()
    found = prepared(tokenizer, tmp_path)
    file = found.train["a"]
    bounds = [*file.document_starts.tolist(), file.num_tokens]
    for text, begin, end in zip(TEXTS, bounds, bounds[1:], strict=False):
        ids = encode(as_text(tokenizer.to_str()), text)
        assert [*ids, 0] == file.tokens[begin:end].tolist() and 0 not in ids


def test_a_resumed_preparation_keeps_its_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("powertrain.data.sources.BLOCK", 1)
    monkeypatch.setattr(data.prepare, "SAVE_SECONDS", 0.0)
    (tmp_path / "whole").mkdir()
    whole = prepared(words(), tmp_path / "whole").token_bytes["a"].tolist()
    real, calls = data.encode.Encoder.__call__, []

    def encode_or_die(self, *arguments):
        calls.append(arguments)
        if len(calls) == 7:  # the third document of validation
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(data.encode.Encoder, "__call__", encode_or_die)
    with pytest.raises(KeyboardInterrupt):
        prepared(words(), tmp_path)
    corpus = Corpus("text", str(tmp_path / "train/*"), validation_path=str(tmp_path / "held/*"))
    again = prepare({"a": corpus}, TokenizerSpec(str(tmp_path / "tokenizer")), tmp_path / "cache")
    assert len(calls) == 9 and again.token_bytes["a"].tolist() == whole
