"""The files' side of the registry: import a trajectory, watch one that grows, and hash one again.

with open_api(config.scheduler) as api:
    import_trajectory(api, "runs/teacher", name="teacher")
    verify_trajectory(api, "teacher")

The service keeps what it is told, and opens no file. What it refuses is raised as Refusal.
"""

from megapd.scheduler.registry.importing import Probe, import_trajectory, watch_trajectory
from megapd.scheduler.registry.verify import verify_trajectory

__all__ = ["Probe", "import_trajectory", "verify_trajectory", "watch_trajectory"]
