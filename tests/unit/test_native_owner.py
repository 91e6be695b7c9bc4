"""Owners count their users, and each token lands on the reclaim list exactly once, whoever drops the last user."""

from __future__ import annotations

import _thread
import ctypes
import gc
import itertools
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import ModuleType
from typing import Any

import pytest

CPU = (1, 0)
UINT8 = (1, 8, 1)
MEMORY = ctypes.create_string_buffer(4096)


def capsule_of(native: ModuleType, owner: Any, *, versioned: bool = True) -> Any:
    return native.dlpack_capsule(owner, ctypes.addressof(MEMORY), CPU, UINT8, (16,), (1,), 0, versioned)


def run_python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(autouse=True)
def empty_list(native: ModuleType) -> Any:
    native.reclaim_drain()
    yield
    gc.collect()
    assert native.reclaim_drain() == []


# ------------------------------------------------------------------------------------------------- counting


def test_references_and_capsules_are_users_and_the_owner_is_not(native: ModuleType) -> None:
    owner = native.Owner(token=7)
    assert (owner.token, owner.users) == (7, 0)
    reference = owner.reference()
    assert (reference.token, reference.users) == (7, 1)
    capsule = capsule_of(native, owner)
    another = capsule_of(native, reference)
    assert owner.users == 3
    del capsule, another
    assert owner.users == 1
    del reference
    assert owner.users == 0
    assert native.reclaim_drain() == []
    del owner
    assert native.reclaim_drain() == [7]


def test_last_user_after_the_owner_is_gone(native: ModuleType) -> None:
    reference = native.Owner(1 << 63).reference()
    assert native.reclaim_drain() == []
    assert (reference.token, reference.users) == (1 << 63, 1)
    del reference
    assert native.reclaim_drain() == [1 << 63]


def test_release_is_idempotent_and_final(native: ModuleType) -> None:
    owner = native.Owner(3)
    reference = owner.reference()
    owner.release()
    owner.release()
    with pytest.raises(RuntimeError, match="token 3 was released"):
        owner.reference()
    with pytest.raises(RuntimeError, match="token 3 was released"):
        capsule_of(native, owner)
    assert owner.users == 1
    assert native.reclaim_drain() == []

    capsule = capsule_of(native, reference)  # the reference keeps the memory alive, so this is safe
    del reference
    assert owner.users == 1
    del capsule
    assert native.reclaim_drain() == [3]
    # the block on the list is gone, what the owner object says is not
    assert (owner.token, owner.users) == (3, 0)
    owner.release()
    del owner
    assert native.reclaim_drain() == []


def test_tokens_come_oldest_first(native: ModuleType) -> None:
    owners = [native.Owner(token) for token in range(100)]
    order = random.Random(5).sample(range(100), 100)
    for i in order:
        owners[i].release()
    assert native.reclaim_drain() == order


@pytest.mark.parametrize(
    ("token", "error"),
    [(-1, OverflowError), (1 << 64, OverflowError), ("1", TypeError), (1.0, TypeError), (None, TypeError)],
)
def test_token_that_is_no_token(native: ModuleType, token: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        native.Owner(token)


def test_types_are_closed(native: ModuleType) -> None:
    for kind in (native.Reference, native.Import):
        with pytest.raises(TypeError, match="cannot create"):
            kind()
    for kind in (native.Owner, native.Reference, native.Import):
        with pytest.raises(TypeError, match="immutable"):
            kind.token = 1
        with pytest.raises(TypeError, match="not an acceptable base type"):
            type("Derived", (kind,), {})


# -------------------------------------------------------------------------------------------------- waiting


def test_wait_runs_out(native: ModuleType) -> None:
    before = time.monotonic()
    assert native.reclaim_wait(0.12) is False
    assert time.monotonic() - before >= 0.12
    assert native.reclaim_wait(0) is False


def test_wait_sees_a_token_that_is_there(native: ModuleType) -> None:
    native.Owner(1)
    assert native.reclaim_wait(float("inf")) is True
    assert native.reclaim_wait(float("inf")) is True  # it is the drain that takes it
    assert native.reclaim_drain() == [1]
    assert native.reclaim_wait(0) is False


@pytest.mark.parametrize("wake", ["token", "call"])
def test_wait_on_a_thread_is_woken(native: ModuleType, wake: str) -> None:
    found: list[bool] = []
    waiter = threading.Thread(target=lambda: found.append(native.reclaim_wait(float("inf"))), daemon=True)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()  # and this thread runs meanwhile, so the wait has no GIL
    if wake == "token":
        native.Owner(1)
    else:
        native.reclaim_wake()
    waiter.join(30)
    assert found == [True]
    assert native.reclaim_drain() == ([1] if wake == "token" else [])
    assert native.reclaim_wait(0) is False


def test_wake_before_the_wait_is_not_lost(native: ModuleType) -> None:
    native.reclaim_wake()
    assert native.reclaim_wait(float("inf")) is True
    assert native.reclaim_wait(0) is False


def test_wait_on_the_main_thread_can_be_interrupted(native: ModuleType) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    timer = threading.Timer(0.1, _thread.interrupt_main)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            native.reclaim_wait(float("inf"))
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_wait_for_a_time_that_is_none(native: ModuleType, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        native.reclaim_wait(timeout)


# -------------------------------------------------------------------------------------------- threads, forks


def test_ten_thousand_capsules_on_four_threads(native: ModuleType) -> None:
    count, threads = 10_000, 4
    owners = [native.Owner(token) for token in range(count)]
    things: list[Any] = []
    for i, owner in enumerate(owners):
        things.append(capsule_of(native, owner if i % 3 else owner.reference(), versioned=bool(i % 2)))
    random.Random(1).shuffle(things)
    start = threading.Barrier(threads + 1)
    drained: list[list[int]] = []
    stop = threading.Event()

    def work(mine: list[Any], seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        held = []
        while mine:
            thing = mine.pop()
            if rng.random() < 0.6:
                held.append(native.consume(thing))
            if rng.random() < 0.5 and held:
                held.pop(rng.randrange(len(held)))
        rng.shuffle(held)
        while held:
            held.pop()

    def drain() -> None:
        start.wait()
        while not stop.is_set():
            native.reclaim_wait(0.01)
            drained.append(native.reclaim_drain())

    for owner in owners[::2]:
        owner.release()
    workers = [threading.Thread(target=work, args=(things[i::threads], i)) for i in range(threads - 1)]
    drainer = threading.Thread(target=drain)
    mine = things[threads - 1 :: threads]
    del things
    for thread in [*workers, drainer]:
        thread.start()
    work(mine, threads - 1)
    for thread in workers:
        thread.join()
    assert {owner.users for owner in owners} == {0}
    for owner in owners[1::2]:
        owner.release()
    stop.set()
    native.reclaim_wake()
    drainer.join()
    drained.append(native.reclaim_drain())
    assert sorted(itertools.chain.from_iterable(drained)) == list(range(count))


def test_owners_of_the_parent_do_nothing_in_a_forked_child() -> None:
    out = run_python(
        """
        import ctypes, os, sys
        from dlpoffload import _native

        memory = ctypes.create_string_buffer(64)
        def capsule(owner):
            return _native.dlpack_capsule(owner, ctypes.addressof(memory), (1, 0), (1, 8, 1), (4,), (1,), 0, True)

        waiting = _native.Owner(1)
        waiting.release()
        owners = {token: _native.Owner(token) for token in (2, 3, 4)}
        held = [capsule(owners[2]), _native.consume(capsule(owners[3])), owners[4].reference()]
        assert _native.fork_generation() == 0
        child = os.fork()
        if child == 0:
            assert _native.fork_generation() == 1
            assert _native.reclaim_drain() == []        # what waited is the parent's
            assert owners[2].users == 1
            held.clear()
            assert owners[2].users == 0
            owners.clear()
            del waiting
            assert _native.reclaim_drain() == []
            assert _native.reclaim_wait(0.01) is False
            _native.Owner(9)                            # one of the child's own
            assert _native.reclaim_wait(5) is True
            assert _native.reclaim_drain() == [9]
            grandchild = os.fork()
            if grandchild == 0:
                assert _native.fork_generation() == 2
                sys.exit(0)
            _, status = os.waitpid(grandchild, 0)
            sys.exit(os.waitstatus_to_exitcode(status))  # the whole way out, not os._exit
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert _native.reclaim_drain() == [1]
        assert [owner.users for owner in owners.values()] == [1, 1, 1]
        held.clear()
        owners.clear()
        assert sorted(_native.reclaim_drain()) == [2, 3, 4]
        print("parent done")
        """
    )
    assert out == "parent done\n"


def test_a_count_is_lent_to_c_code(native: ModuleType) -> None:
    owner = native.Owner(41)
    lent = [owner.lend() for _ in range(3)]
    assert owner.users == 3
    owner.take_back()
    argument, address = lent[0]
    give_back = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    thread = threading.Thread(target=give_back, args=(argument,))
    thread.start()
    thread.join()
    owner.release()
    with pytest.raises(RuntimeError, match="released"):
        owner.lend()
    assert owner.users == 1
    assert native.reclaim_drain() == []
    give_back(argument)
    assert native.reclaim_drain() == [41]


def test_fork_while_another_thread_waits() -> None:
    out = run_python(
        """
        import os, sys, threading, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads is the point here
        from dlpoffload import _native

        thread = threading.Thread(target=_native.reclaim_wait, args=(float("inf"),))
        thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                _native.Owner(1)
                assert _native.reclaim_wait(5) is True
                assert _native.reclaim_drain() == [1]
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
        assert thread.is_alive()
        _native.reclaim_wake()
        thread.join(30)
        print(thread.is_alive())
        """
    )
    assert out == "False\n"
