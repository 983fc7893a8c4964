"""What is measured is real; how fast it is, no test asks."""

import itertools
import json
from pathlib import Path

import pytest

from powertrain.data.tokens import TokenFile
from powertrain.launch.bench import growth


def test_a_simulated_corpus_is_a_token_file_of_its_size(tmp_path: Path) -> None:
    file = TokenFile(growth.simulated_corpus(tmp_path / "large", 10**12))
    assert file.num_tokens == 10**12 and file.num_documents == 10**6
    assert file.starts_between(10**12 - 1_500_000, 10**12).tolist() == [10**12 - 1_000_000]
    assert (tmp_path / "large.bin").stat().st_blocks * 512 < 1e6
    file = TokenFile(growth.simulated_corpus(tmp_path / "small", 3_000_000))
    file.check(1)


def test_the_median_of_all_rounds_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "ROUNDS", 3)
    calls: list[int] = []

    def task(size: int, seconds: list[float]) -> float:
        calls.append(size)
        return seconds.pop(0)

    tasks = {size: (lambda s=size, t=[100.0, 3.0, size, 1.0]: task(s, t)) for size in (2, 7)}
    assert growth.in_turn(tasks) == {2: 2, 7: 3.0}
    assert calls == list(itertools.chain(*[(2, 7)] * 4))


@pytest.mark.slow
def test_everything_is_measured_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = (*growth.SMALL, "data.sequence_length=16", "batch.sequences=4", "batch.micro_sequences=4")
    sizes = {
        "CORPORA": (10**7, 10**8),
        "SEEN": (0, 10**6),
        "EXPERTS": (8, 16),
        "LAYERS": (1, 2),
        "RECORDED": (200, 400),
    }
    for name, value in {**sizes, "BASE": tiny, "SMALL": tiny, "ROUNDS": 1, "STEPS": 1}.items():
        monkeypatch.setattr(growth, name, value)
    monkeypatch.setattr("sys.argv", ["growth", str(tmp_path / "out")])
    growth.main()
    found = json.loads((tmp_path / "out/growth.json").read_text())
    assert found.pop("hardware")["cores"] >= 1
    assert [len(values) for values in found.values()] == [2] * 9
    assert all(seconds > 0 for values in found.values() for seconds in values.values())
    assert (tmp_path / "out/growth.png").stat().st_size > 10_000
