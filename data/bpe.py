"""Trains a byte-level BPE. As a script it does so in a process of its own, for only there can it be stopped: a process
that trains one sees no signal until it is done."""

import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

LONGEST_WORD = 4096  # bytes; training takes time in proportion to its square


def train(texts: Iterable[str], vocab_size: int, end_of_text: str) -> Any:
    """A tokenizer (of `tokenizers`) whose merges are learned from the texts. It writes any text.

    What stands between two places where the tokenizer cuts, such as a run of letters, is learned from in parts of
    LONGEST_WORD bytes. The tokenizer itself does not cut there.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(length=LONGEST_WORD)])
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[end_of_text],
            initial_alphabet=sorted(byte_level.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.pre_tokenizer = byte_level
    return tokenizer


def _end_with_parent() -> None:
    os.read(0, 1)  # which returns when nobody can write there any more
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too
    sys.path.append(sys.argv[1])  # where the parent has found `tokenizers`
    arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.buffer.write(train(*arguments).to_str().encode())
    sys.stdout.flush()
    os._exit(0)
