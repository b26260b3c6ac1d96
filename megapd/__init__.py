"""megapd: progressive distillation pre-training on DeepSpeed.

    config = megapd.load("student.yaml", ["--training.steps=2000"])
    result = megapd.train(config, callbacks=[MyCallback()])

What is named here is imported when it is first asked for: `import megapd` alone imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapd.config import Config, load
    from megapd.errors import UserError
    from megapd.training import Callback, Run, StepResult, TrainingResult, train

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "Run", "StepResult", "TrainingResult", "UserError", "__version__", "load", "train"]

_ROOMS = {"Config": "megapd.config", "load": "megapd.config", "UserError": "megapd.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS.get(name, "megapd.training")), name)


def __dir__() -> list[str]:
    return __all__
