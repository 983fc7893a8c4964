"""Trains a byte-level BPE. Run as a script, in a process of its own, because only so can it be stopped: the training
call handles no signal until it returns."""

import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

LONGEST_WORD = 4096  # bytes; training time grows with its square


def train(texts: Iterable[str], vocab_size: int, end_of_text: str) -> Any:
    """A tokenizer (of `tokenizers`) whose merges are learned from the texts. It encodes any text.

    Training splits words, as the pre-tokenizer makes them, into parts of LONGEST_WORD bytes. The tokenizer itself does
    not split there.
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
    os.read(0, 1)  # returns when the parent, which holds the other end, has ended
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    sys.path.append(sys.argv[1])  # where the parent found `tokenizers`
    arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.buffer.write(train(*arguments).to_str().encode())
    sys.stdout.flush()
    os._exit(0)
