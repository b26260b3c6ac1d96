"""Secrets in texts, trees, logs and tracebacks."""

import logging
import sys

import pytest

from megapd.errors import MASK, MaskedFormatter, hide, mask_process, masked, masked_tree


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://user:word@host/name", f"postgresql://user:{MASK}@host/name"),
        ("postgresql://user:wo@rd@host:1/name", f"postgresql://user:{MASK}@host:1/name"),
        ("a postgresql://u:w@h/n?password=x&sslmode=on b", f"a postgresql://u:{MASK}@h/n?password={MASK}&sslmode=on b"),
        ("https://u:a@b, ftp://v:c@d", f"https://u:{MASK}@b, ftp://v:{MASK}@d"),
        ("https://host/?api_key=abc", f"https://host/?api_key={MASK}"),
        ("postgresql://user@host/name", None),
        ("http://127.0.0.1:8480/v1/runs/a@b", None),
        ("grpc://h:1, m@h", None),
        ("user:word@host", None),
    ],
)
def test_addresses(text, shown):
    assert masked(text) == (text if shown is None else shown)
    assert masked(masked(text)) == masked(text)
    assert masked_tree({"a": [text, 1, None, {text: text}]}) == {"a": [masked(text), 1, None, {text: masked(text)}]}


def test_hidden_values():
    assert masked("open sesame!") == "open sesame!"
    hide("sesame!!")
    hide("short")
    assert masked("open sesame!!, short") == f"open {MASK}, short"


def test_logs_and_tracebacks(capsys, monkeypatch):
    hide("a planted value")
    monkeypatch.setattr(sys, "argv", ["megapd", "train", "--scheduler.database=postgresql://u:word@h/n"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("threading.excepthook", None)
    mask_process()
    assert sys.argv[1:] == ["train", f"--scheduler.database=postgresql://u:{MASK}@h/n"]
    try:
        raise ValueError("a planted value, postgresql://u:word@h/n")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
        record = logging.LogRecord("x", logging.ERROR, "", 1, "%s", (error,), sys.exc_info())
    told = capsys.readouterr().err
    for text in (told, MaskedFormatter().format(record)):
        assert f"ValueError: {MASK}, postgresql://u:{MASK}@h/n" in text
        assert "u:word" not in text
