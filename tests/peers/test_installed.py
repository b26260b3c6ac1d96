"""A peer that cannot be imported makes its tests skip: where all are asked for, that is a failure."""

from __future__ import annotations

import importlib
import os
import warnings

import pytest

PEERS = [
    "liger_kernel.chunked_loss",
    "liger_kernel.transformers",
    "torchtune.modules.loss.kd_losses",
    "transformers.loss.loss_utils",
    "trl.experimental.gkd",
    "trl.experimental.gold",
    "trl.trainer.distillation_trainer",
]


@pytest.mark.skipif(os.environ.get("MEGAPD_PEERS") != "required", reason="MEGAPD_PEERS=required, as make test-peers sets it")
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_there(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the peers; an error would leave modules half imported
        importlib.import_module(name)
