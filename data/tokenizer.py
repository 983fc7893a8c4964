"""Loading and saving a tokenizer: it is what its tokenizer.json says, whatever class its folder names.

Transformers' AutoTokenizer takes the vocabulary from the file and rebuilds the rest as the named class has it:
GPT2Tokenizer drops the file's splitting of digits, others its normalizer. A configuration can also add tokens or flags
that the file does not have. Both would change the ids of a text, so both are ignored here.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powertrain.data import DataError, bpe, expand
from powertrain.data.cache import Progress, building, complete, short_hash
from powertrain.data.sources import Corpus, documents, split_documents

END_OF_TEXT = "<|endoftext|>"
SAMPLE_BYTES = 64 << 20  # of text that a tokenizer is trained on
PIECE = 1 << 18  # characters of one encoded string at most
FILE = "tokenizer.json"
# Where tokenizers differ: case, digits, white space, contractions, composed characters, other scripts.
SAMPLE = (
    " Hello  world, x = 1234567\n\n\tdef f(a):\r\n    return don't, I'LL, 3.14 \u00e9 e\u0301 \ufb01 \uff21 "
    "\u6f22\u5b57 \u0440\u0443\u0441 \U0001f642 a  "
)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder or of a name on the hub, as a PreTrainedTokenizerFast of Transformers.

    It encodes and decodes as `tokenizers.Tokenizer.from_file` does with tokenizer.json, without the truncation and
    padding that may be set there. The names of special tokens come from its configuration. Without a tokenizer.json,
    vocabulary files are converted to one.

    Raises:
        DataError: it cannot be loaded or converted, or has no end-of-text token.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    place = expand(path)
    try:
        file = cached_file(place, FILE, _raise_exceptions_for_missing_entries=False)
        if file is None:
            named, backend = _converted(place)
        else:
            named = PreTrainedTokenizerFast.from_pretrained(place)
            backend = Tokenizer.from_file(file)
            if named.eos_token is None:
                with suppress(Exception):  # its class may define an eos_token, if it can be built at all
                    named = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # anything that is wrong with a file or the network
        raise DataError(
            f"No tokenizer could be loaded from {str(path)!r}: {type(error).__name__}: {error} Give a folder with a "
            "tokenizer.json or a SentencePiece tokenizer.model (converted after pip install sentencepiece protobuf), a "
            "name on the hub, or no path to train one."
        ) from error
    if backend is None:
        raise DataError(
            f"The tokenizer {str(path)!r} has no tokenizer.json, and a conversion of its vocabulary might give other "
            "tokens. Convert it to a tokenizer.json first, and compare."
        )
    if named.eos_token is None:
        raise DataError(
            f"The tokenizer {str(path)!r} has no end-of-text token, which must follow every document. Set eos_token in "
            "its tokenizer_config.json."
        )
    backend.no_truncation()
    backend.no_padding()
    tokens = {name: getattr(named, name) for name in ("bos_token", "unk_token", "pad_token")}
    return wrap_tokenizer(
        backend,
        eos_token=named.eos_token,
        **{name: token for name, token in tokens.items() if token and backend.token_to_id(token) is not None},
    )


def wrap_tokenizer(backend: Any, **special_tokens: str) -> Any:
    """A PreTrainedTokenizerFast of Transformers from a `tokenizers.Tokenizer` and names for its special tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special_tokens,
    )


def save_tokenizer(tokenizer: Any, folder: Path, **more: Any) -> None:
    """Write a tokenizer of `load_tokenizer` or `wrap_tokenizer` so that AutoTokenizer of Transformers 4 and of 5 gives
    the same ids. `more` goes into its tokenizer_config.json."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):  # of the object that was saved
        settings.pop(name, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} | more  # 5 writes a class that 4 does not have
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _converted(place: str) -> tuple[Any, Any]:
    """(the tokenizer made of the vocabulary files of a folder without tokenizer.json, its backend). The backend is
    None if it may give other tokens."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    if cached_file(place, "tokenizer.model", _raise_exceptions_for_missing_entries=False):
        # From the model itself: a named class would replace its normalizer by one of its own.
        named = PreTrainedTokenizerFast.from_pretrained(place)
    else:
        named = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    vocabulary = str(getattr(named, "vocab_file", None))
    same = os.path.isfile(vocabulary)  # else the class did not find its files, and the tokenizer is empty
    if vocabulary.endswith(".model"):
        from sentencepiece import SentencePieceProcessor

        expected = SentencePieceProcessor(model_file=vocabulary).encode(SAMPLE)
        same = named.encode(SAMPLE, add_special_tokens=False) == expected
    return named, getattr(named, "backend_tokenizer", None) if same else None


def train_tokenizer(
    corpora: Mapping[str, Corpus], sources: Mapping[str, Any], vocab_size: int, cache: Path, report: Progress
) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(
            f"The tokenizer's vocab_size is {vocab_size}; a byte-level one needs at least {len(alphabet) + 1}: every "
            "byte and the end-of-text token. Raise it; 4096 suits small models."
        )
    folder = trained_folder(sources, vocab_size, cache)
    if complete(folder, "tokenizer.json"):
        return folder

    def sample() -> Iterator[str]:
        """The first training documents of each corpus, the same number of bytes from each."""
        limit = SAMPLE_BYTES // len(corpora)
        for name, corpus in corpora.items():
            used, taken = 0, set()
            report(f"reading {name} for the tokenizer", 0, None)
            for document in split_documents(corpus, documents(corpus)):
                if document.split == "train" and document.digest not in taken:
                    yield from pieces(document.text[: limit - used])
                    used += document.size
                    if corpus.deduplicate:
                        taken.add(document.digest)
                report(f"reading {name} for the tokenizer", used, None)
                if used >= limit:
                    break

    # No padding token: if end of text were one, a model's nn.Embedding(padding_idx=…) would not train its row.
    trained = Tokenizer.from_str(_trained_apart(list(sample()), vocab_size, report))
    with building(folder) as temporary:
        save_tokenizer(wrap_tokenizer(trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT), temporary)
    return folder


def _trained_apart(texts: list[str], vocab_size: int, report: Progress) -> str:
    """The tokenizer.json that `bpe.train` makes of the texts. It runs in a process of its own, so that this one still
    handles signals and what `report` raises."""
    import tokenizers

    installed = str(Path(tokenizers.__file__).parent.parent)
    with tempfile.TemporaryFile() as written:
        # -I: it imports from the installed packages only, never from the current folder.
        process = subprocess.Popen(
            [sys.executable, "-I", bpe.__file__, installed], stdin=subprocess.PIPE, stdout=written
        )
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has exited; its status says why
                pickle.dump((texts, vocab_size, END_OF_TEXT), process.stdin)
                process.stdin.flush()
            while process.poll() is None:
                report("training the tokenizer", 0, None)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
        if process.returncode:
            raise ChildProcessError(
                f"The process that trains the tokenizer exited with status {process.returncode}. A negative status is "
                "the signal that killed it, most likely out of memory: give it less text or more memory."
            )
        written.seek(0)
        return written.read().decode()


def trained_folder(sources: Mapping[str, Any], vocab_size: int, cache: Path) -> Path:
    import tokenizers

    return cache / f"tokenizer-{short_hash([sources, vocab_size, SAMPLE_BYTES, tokenizers.__version__])}"


def fetch_tokenizer(path: str, cache: Path) -> Path:
    """The folder of the tokenizer's copy in the cache, named by its content."""
    loaded, folder = named_tokenizer(path, cache)
    if not complete(folder, "tokenizer.json"):
        with building(folder) as temporary:
            save_tokenizer(loaded, temporary)
    return folder


def named_tokenizer(path: str, cache: Path) -> tuple[Any, Path]:
    """The tokenizer, and the folder of its copy in the cache, which may not exist."""
    loaded = load_tokenizer(path)
    identity = short_hash([loaded.backend_tokenizer.to_str(), loaded.eos_token_id])
    return loaded, cache / f"tokenizer-{identity}"


def as_text(tokenizer_json: str) -> Any:
    """The tokenizer (of `tokenizers`) as training and evaluation encode texts: without truncation or padding, and
    "<|endoftext|>" inside a text is encoded as text, not as the end-of-text token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text as in a prepared corpus, without the end-of-text token; `tokenizer`: from `as_text`."""
    encodings = (tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0] for piece in pieces(text))
    return [number for encoding in encodings for number in encoding.ids]


def bytes_of_tokens(tokenizer_json: str) -> npt.NDArray[np.int64] | None:
    """The bytes of text that each token stands for, by id, (ids,); 0 for special tokens.

    None where that depends on the text, because the tokenizer is not lossless: it has unknown tokens, a normalizer, or
    drops white space. Lossless is a byte-level BPE that has a token for every byte.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    facts = json.loads(tokenizer_json)
    model, first = facts["model"], facts["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    kinds = {step.get("type") for step in steps}
    keeps_all = (
        facts["normalizer"] is None
        and "ByteLevel" in kinds
        and kinds <= {"ByteLevel", "Digits", "Split", "Punctuation"}
        and not any(step.get("behavior") == "Removed" or step.get("add_prefix_space") for step in steps)
        and model["type"] == "BPE"
        and model["vocab"].keys() >= set(ByteLevel.alphabet())
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and not any(token["lstrip"] or token["rstrip"] for token in facts["added_tokens"] if not token["special"])
    )
    if not keeps_all:
        return None
    sizes = {number: len(token) for token, number in model["vocab"].items()}  # the vocab writes a byte as a character
    for token in facts["added_tokens"]:
        sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    found = np.zeros(max(sizes) + 1, np.int64)
    found[list(sizes)] = list(sizes.values())
    return found


def bytes_by_offsets(text: str, offsets: list[tuple[int, int]], before: int) -> tuple[list[int], int]:
    """Bytes from the end of the token before to each token's end, `before` more for the first; and the bytes after the
    last. So bytes between two tokens count for the second, and a character split into several tokens for the first.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    ends = np.cumsum(np.concatenate([[0], 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)]))
    reached = np.maximum.accumulate(ends[np.array([end for _, end in offsets], int)]) + before
    total = int(ends[-1]) + before
    return np.diff(reached, prepend=0).tolist(), total - int(reached[-1] if len(reached) else 0)


def rows_needed(tokenizer: Any) -> int:
    """The rows an embedding needs for a tokenizer of `transformers` or `tokenizers`: ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters, because encoding needs far more memory than the text. Pieces end
    between a word and a space, where byte-level pre-tokenizers split anyway; without such a place, after PIECE."""
    begin = 0
    while len(text) - begin > PIECE:
        cut = text.rfind(" ", begin + 1, begin + PIECE)
        while cut > begin and text[cut - 1].isspace():
            cut = text.rfind(" ", begin + 1, cut)
        cut = cut if cut > begin else begin + PIECE
        yield text[begin:cut]
        begin = cut
    yield text[begin:]
