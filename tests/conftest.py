"""Threads are few on a test machine; more than one a process would make ranks wait for each other."""

import os
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "megapd-tests")  # not the user's own

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is first imported

import pytest


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """DeepSpeed's ZeRO-3 may replace F.linear for the process, and a later test of the same process then fails."""
    before = torch.nn.functional.linear
    yield
    assert torch.nn.functional.linear is before, "this test leaves torch.nn.functional.linear replaced"


def pytest_configure(config):
    starts_workers = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if "not slow" in config.option.markexpr and not starts_workers:
        sys.addaudithook(_refuse_processes)


def _refuse_processes(event, arguments):
    """A test that starts one takes seconds: it is to be marked slow. What libraries ask of the system when imported may pass."""
    if event == "os.fork" or (event == "subprocess.Popen" and os.fspath(arguments[0]) == sys.executable):
        raise AssertionError("this test starts a process: mark it slow")
