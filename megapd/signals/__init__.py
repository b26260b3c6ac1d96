"""Signals: what a teacher says about a batch, the kinds there are of it, and its Arrow form."""

from megapd.signals import kinds  # noqa: F401 - registers them
from megapd.signals.arrow import NO_ARROW, check_form, decode, digests_of, encode, valid_rows
from megapd.signals.heads import decode_head, encode_head
from megapd.signals.signal import Signal, as_sent, pack
from megapd.signals.spec import (
    DTYPES,
    Answer,
    Column,
    Encoding,
    Head,
    LossTargets,
    SignalKind,
    SignalSpec,
    TeacherOutput,
    definition_of,
    negotiate,
)

__all__ = [
    "DTYPES",
    "NO_ARROW",
    "Answer",
    "Column",
    "Encoding",
    "Head",
    "LossTargets",
    "Signal",
    "SignalKind",
    "SignalSpec",
    "TeacherOutput",
    "as_sent",
    "check_form",
    "decode",
    "decode_head",
    "definition_of",
    "digests_of",
    "encode",
    "encode_head",
    "negotiate",
    "pack",
    "valid_rows",
]
