"""A package outside megapd: a task, a model, a schedule policy, a callback and a tracker, found by its entry points."""
