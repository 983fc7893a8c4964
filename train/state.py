"""Where a run is: integers only, so that they are exact on every rank and in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class State:
    """Progress of a run.

    Attributes:
        step: optimizer steps taken.
        samples: windows trained on by this run; the next step begins with sample number `samples`.
        tokens: n, the clock that the schedule reads: `run.tokens_seen` plus the tokens of this run,
            masked targets included.
        skipped_in_a_row: steps since the last one whose gradient was finite.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0

    def advance(self, sequences: int, sequence_length: int, skipped: bool) -> None:
        """Account for a step of `sequences` windows. A skipped step has used its data too."""
        self.step += 1
        self.samples += sequences
        self.tokens += sequences * sequence_length
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
