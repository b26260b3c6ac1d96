"""What students and a served teacher say to each other, how it travels, and how a teacher says no."""

from megapd.teacher.wire.calls import (
    decode_catalogue,
    encode_catalogue,
    encode_head_question,
    parse_head_question,
    parse_json,
    parse_teacher,
)
from megapd.teacher.wire.messages import (
    HEAD,
    KIND_BYTES,
    MESSAGE_BYTES,
    SIGNAL,
    answer_length,
    fill,
    pieces,
    read_record,
    read_stream,
    stream_bytes,
    stream_parts,
)
from megapd.teacher.wire.refusals import MAX_ANSWER_BYTES, RefusalKind, Refused, refusal
from megapd.teacher.wire.requests import Memory, Request, check_request, decode_request, encode_request, with_memory
from megapd.teacher.wire.secrets import bearer, check_token, read_token
from megapd.teacher.wire.shared_memory import Mappings, Slot, Slots, write

__all__ = [
    "HEAD",
    "KIND_BYTES",
    "MAX_ANSWER_BYTES",
    "MESSAGE_BYTES",
    "SIGNAL",
    "Mappings",
    "Memory",
    "RefusalKind",
    "Refused",
    "Request",
    "Slot",
    "Slots",
    "answer_length",
    "bearer",
    "check_request",
    "check_token",
    "decode_catalogue",
    "decode_request",
    "encode_catalogue",
    "encode_head_question",
    "encode_request",
    "fill",
    "parse_head_question",
    "parse_json",
    "parse_teacher",
    "pieces",
    "read_record",
    "read_stream",
    "read_token",
    "refusal",
    "stream_bytes",
    "stream_parts",
    "with_memory",
    "write",
]
