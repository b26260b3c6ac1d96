"""A package outside megapd: a task, a schedule policy, a callback and a tracker, found by its entry points."""
