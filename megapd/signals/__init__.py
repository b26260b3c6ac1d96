"""Signals: what a teacher says about a batch, the kinds there are of it, and its Arrow form."""

from megapd.signals import kinds  # noqa: F401 - registers them
from megapd.signals.arrow import NO_ARROW as NO_ARROW
from megapd.signals.arrow import check_form as check_form
from megapd.signals.arrow import decode as decode
from megapd.signals.arrow import decode_head as decode_head
from megapd.signals.arrow import digests_of as digests_of
from megapd.signals.arrow import encode as encode
from megapd.signals.arrow import encode_head as encode_head
from megapd.signals.arrow import valid_rows as valid_rows
from megapd.signals.signal import DTYPES as DTYPES
from megapd.signals.signal import Answer as Answer
from megapd.signals.signal import Column as Column
from megapd.signals.signal import Encoding as Encoding
from megapd.signals.signal import Head as Head
from megapd.signals.signal import LossTargets as LossTargets
from megapd.signals.signal import Signal as Signal
from megapd.signals.signal import SignalKind as SignalKind
from megapd.signals.signal import SignalSpec as SignalSpec
from megapd.signals.signal import TeacherOutput as TeacherOutput
from megapd.signals.signal import as_sent as as_sent
from megapd.signals.signal import definition_of as definition_of
from megapd.signals.signal import negotiate as negotiate
from megapd.signals.signal import not_finite as not_finite
from megapd.signals.signal import pack as pack
