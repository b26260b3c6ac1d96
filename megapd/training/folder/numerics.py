"""The version of megapd's numbers: raised by whatever changes what an unchanged configuration learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megapd.config import Config, TransformerConfig
from megapd.tiling import tile
from megapd.world import World

Predicate = Callable[[Config, World], bool]


def _sums_were_in_half(config: Config, world: World) -> bool:
    several = world.size > 1 or tile(config.training, world.size).accumulation > 1
    return config.training.precision != "fp32" and several


def _norms_were_in_half(config: Config, world: World) -> bool:
    on_cpu = config.training.precision != "fp32" and world.device.type == "cpu"
    return on_cpu and isinstance(config.model, TransformerConfig)


# version -> what came with it, and which resumed runs it changes. What changes only how a run begins changes no resumed one: of
# version 2, the initial weights, which are keyed by shape too.
CHANGES: Mapping[int, tuple[tuple[str, Predicate], ...]] = {
    2: (
        ("gradients of micro-batches and ranks are summed in fp32, not in the model's type", _sums_were_in_half),
        ("on a CPU the gradients of norms and embeddings are summed in fp32, not in the model's type", _norms_were_in_half),
    ),
}
VERSION = max(CHANGES, default=1)


def affected(config: Config, world: World, since: int) -> list[str]:
    """What would change the numbers of a run of `config` on these ranks that began with version `since`, a sentence each."""
    later = (change for version in sorted(CHANGES) if version > since for change in CHANGES[version])
    return [sentence for sentence, changes in later if changes(config, world)]
