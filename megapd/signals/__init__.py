"""Signals: what a teacher says about a batch, the kinds there are of it, and its Arrow form."""

from megapd.signals import kinds  # noqa: F401 - registers them
from megapd.signals.arrow import NO_ARROW, check_form, decode, digests_of, encode, valid_rows
from megapd.signals.heads import decode_head, encode_head
from megapd.signals.signal import Signal, SignalDamaged, SignalMismatch, as_sent, pack
from megapd.signals.spec import (
    DTYPES,
    SIGNAL_KINDS,
    Answer,
    Column,
    Encoding,
    Head,
    LossTargets,
    SignalKind,
    SignalSpec,
    TeacherOutput,
    negotiate,
    signal_kind,
)

__all__ = [
    "DTYPES",
    "NO_ARROW",
    "SIGNAL_KINDS",
    "Answer",
    "Column",
    "Encoding",
    "Head",
    "LossTargets",
    "Signal",
    "SignalDamaged",
    "SignalKind",
    "SignalMismatch",
    "SignalSpec",
    "TeacherOutput",
    "as_sent",
    "check_form",
    "decode",
    "decode_head",
    "digests_of",
    "encode",
    "encode_head",
    "negotiate",
    "pack",
    "signal_kind",
    "valid_rows",
]
