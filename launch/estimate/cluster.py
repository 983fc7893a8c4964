"""The machines that an estimate is for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from powertrain.train.config import Config
from powertrain.train.errors import ConfigError
from powertrain.train.hardware import GPUS

# 419 unexpected interruptions in 54 days on 16,384 H100s: arXiv 2407.21783, section 3.3.4.
FAILURE_HOURS = 54 * 24 * 16_384 / 419


@dataclass
class Cluster:
    """The machines, and what is assumed of them; `powertrain estimate --help` describes the fields."""

    gpu: str = "H100"
    gpus: int = 1
    gpus_per_node: int = 8
    memory: float | None = None
    peak: float | None = None
    mfu: float = 0.4
    price: float | None = None
    write: float = 1e9
    failure_hours: float = FAILURE_HOURS
    restart_minutes: float = 15

    @property
    def on_gpu(self) -> bool:
        return self.gpu != "cpu"

    def engines(self, config: Config) -> list[str]:
        """The ways to run on it, simplest first; with `engine.expect` that one."""
        known = ["plain"] if self.gpus == 1 else ["ddp", "zero1", "zero2", "zero3"]
        known += ["zero3_offload"] if self.on_gpu else []
        expected = config.engine.expect
        return known if expected is None else [each for each in known if each.startswith(expected)] or [expected]


def cluster_of(settings: list[str]) -> Cluster:
    """The cluster that KEY=VALUE settings describe.

    Raises:
        ConfigError: a setting or GPU that is not known, or a value out of its range.
    """
    try:
        given = OmegaConf.from_dotlist(settings)
        found: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Cluster), given))
    except (OmegaConfBaseException, YAMLError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(Cluster))
        raise ConfigError(f"cluster: {str(error).partition(chr(10))[0]}. Its settings are {known}.") from error
    cluster: Cluster = found
    for name, value in vars(cluster).items():
        if isinstance(value, (int, float)) and not 1e-9 <= value <= 1e24:
            raise ConfigError(f"cluster.{name} is {value}; it has to be a number greater than zero, from 1e-9 to 1e24.")
    if cluster.gpu in GPUS:
        peak, memory = GPUS[cluster.gpu]
        cluster.peak, cluster.memory = cluster.peak or peak, cluster.memory or memory
    elif cluster.gpu == "cpu":
        import psutil

        cluster.memory = cluster.memory or psutil.virtual_memory().total / min(cluster.gpus, cluster.gpus_per_node)
    elif cluster.memory is None or cluster.peak is None:
        raise ConfigError(
            f"cluster.gpu is {cluster.gpu}, which is none of {', '.join(GPUS)} and cpu: give cluster.memory in bytes "
            "and cluster.peak in FLOP/s."
        )
    if cluster.mfu > 1:
        raise ConfigError(f"cluster.mfu is {cluster.mfu}; it is a share of the peak, at most 1.")
    return cluster
