"""The files' side of the registry: import a trajectory, watch one that grows, and hash one again.

with open_api(config.scheduler) as api:
    registry = Registry(api)
    import_trajectory(registry, "runs/teacher", name="teacher")
    verify_trajectory(registry, "teacher")
"""

from megapd.scheduler.registry.importing import Probe, import_trajectory, watch_trajectory
from megapd.scheduler.registry.records import Registry
from megapd.scheduler.registry.verify import verify_trajectory

__all__ = ["Probe", "Registry", "import_trajectory", "verify_trajectory", "watch_trajectory"]
