"""The progress of a run, and where a start of it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAW, AVERAGE = "raw", "average"  # which weights: those that are trained, or their running average


@dataclass
class State:
    """Progress of a run: integers only, so that they are exact on every rank and in every checkpoint.

    Attributes:
        step: optimizer steps taken.
        samples: sequences trained on by this run; the next step begins with sequence number `samples`.
        tokens: n, the clock that the schedule reads: `run.tokens_seen` plus the tokens of this run,
            masked targets included.
        skipped_in_a_row: steps since the last one whose gradient was finite.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0

    def advance(self, sequences: int, sequence_length: int, skipped: bool) -> None:
        """Count a step of `sequences` sequences. A skipped step has used its data, too."""
        self.step += 1
        self.samples += sequences
        self.tokens += sequences * sequence_length
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


@dataclass(frozen=True)
class Beginning:
    """Where a start of a run begins.

    Attributes:
        checkpoint: to resume from; None at the first step.
        own: whether it is the run's own; if not, the run branches off another run here.
        changes: settings that have changed since: setting → [then, now].
        tokens: reading of the clock.
        parent: the checkpoint of another run that this run branched off, if it did.
    """

    checkpoint: Path | None
    own: bool
    changes: dict[str, list[Any]]
    tokens: int
    parent: Path | None
