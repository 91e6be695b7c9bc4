"""Threads that read: in order and bounded, errors in the caller, none left behind, none needed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dlpoffload import HostStore
from dlpoffload.readers import Readers

np = pytest.importorskip("numpy")
save_file = pytest.importorskip("safetensors.numpy").save_file


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("dlpoffload-read_")]


@pytest.mark.parametrize("most", [1, 3, 100])
def test_every_call_is_made_once_and_no_more_threads_than_calls(most: int) -> None:
    with Readers(most) as readers:
        for number in range(5):
            readers.submit(partial(pow, 2, number))
        assert len(reading()) == min(most, 5)
        assert sorted(readers.results(5, block=True)) == [1, 2, 4, 8, 16]
        assert (readers.pending, list(readers.results(5, block=False))) == (0, [])
    assert not reading()


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_what_a_call_raises_is_raised_to_the_caller_and_the_rest_is_not_begun(kind: type[BaseException]) -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        if number:
            time.sleep(0.05)
            return number
        raise kind

    def read() -> None:
        with Readers(2) as readers:
            for number in range(50):
                readers.submit(partial(call, number))
            list(readers.results(50, block=True))

    with pytest.raises(kind):
        read()
    assert not reading()
    assert len(begun) < 50


def test_where_some_threads_or_none_can_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: Any) -> None:
    tensors = {f"{n}.w": np.frombuffer(rng.bytes(1 << 20), "u1") for n in range(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    start = threading.Thread.start
    for given in (0, 1):
        started: list[threading.Thread] = []

        def some(thread: threading.Thread, given: int = given, started: list[threading.Thread] = started) -> None:
            if not thread.name.startswith("dlpoffload-read_"):
                return start(thread)
            if len(started) == given:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            return start(thread)

        with monkeypatch.context() as patch:
            patch.setattr("dlpoffload.checkpoint.reading._READ_NBYTES", 1 << 18)
            patch.setattr(threading.Thread, "start", some)
            store = HostStore.copy_of(tmp_path, device="cpu")
        assert {n: bytes(store.host_view(n).memoryview()) for n in store} == {
            n: t.tobytes() for n, t in tensors.items()
        }
        assert len(started) == given
        store.close()


def test_checkpoints_are_read_when_the_main_thread_has_ended(tmp_path: Path) -> None:
    save_file({"w": np.arange(4096, dtype="f4")}, tmp_path / "x.safetensors")
    script = """
import sys, threading
import dlpoffload as dlpo
from dlpoffload.store import sharing  # imported while that can still be done

path = sys.argv[1]
dlpo.HostStore.copy_of(path, device="cpu").close()

def use():
    threading.main_thread().join()
    with dlpo.HostStore.copy_of(path, device="cpu") as store:
        print(bytes(store.host_view("w").memoryview())[4:8].hex(), flush=True)
    with dlpo.share(path, "after the end") as checkpoint:
        print(list(checkpoint.specs), flush=True)

threading.Thread(target=use).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("0000803f\n['w']\n", "")
