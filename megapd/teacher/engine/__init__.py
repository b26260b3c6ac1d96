"""The teacher itself: a checkpoint's weights in memory, rotated in place, that answer batches with signals."""

from megapd.teacher.engine.options import TeacherOptions
from megapd.teacher.engine.replica import Replica
from megapd.teacher.engine.teacher import Teacher

__all__ = ["Replica", "Teacher", "TeacherOptions"]
