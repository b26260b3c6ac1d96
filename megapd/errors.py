"""Errors that the command line tells in one line."""


class UserError(ValueError):
    """A mistake in the configuration or in the files it points to.

    The message is one line that names the setting or the file, and the fix. The command line prints it without a
    traceback and exits with code 2; every other exception is a fault of megapd and keeps its traceback.
    """


class RunFailed(RuntimeError):
    """A run cannot go on though its settings are right: told in one line, with exit code 1."""


class Diverged(RunFailed):
    """Loss or gradients stayed non-finite for longer than the run allows."""


class TeacherLost(RunFailed):
    """The signal of a step did not come in time, or every replica refuses to give it."""


class SignalMismatch(RunFailed):
    """A signal of another teacher, or for other tokens, than the step asks for."""


class SignalDamaged(RuntimeError):
    """A record whose bytes are not those that were written."""
