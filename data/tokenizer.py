"""Loading and saving a tokenizer: it is what its tokenizer.json says, whatever class its folder names.

Transformers' AutoTokenizer takes the vocabulary from the file and rebuilds the rest as the named class has it:
GPT2Tokenizer drops the file's splitting of digits, others its normalizer. A configuration can also add tokens or flags
that the file does not have. Both would change the ids of a text, so both are ignored here.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from powertrain.data import DataError, expand

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
