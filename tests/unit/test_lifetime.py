"""Who keeps memory alive and who frees it: owners, the reclaim list, threads, forks and the interpreter's end."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dlpoffload as dlpo
from dlpoffload import _native, lifetime, registrations
from dlpoffload.driver import open_driver
from dlpoffload.driver.cpu import CpuDriver
from dlpoffload.errors import ClosedError, RegistrationError

PAGE = 4096

before: Counter[tuple[str, int]] = Counter()
pinned_before = 0


@pytest.fixture(autouse=True)
def baseline() -> None:
    """What other tests may still hold is not counted here."""
    global pinned_before
    gc.collect()
    lifetime.drain()
    before.clear()
    before.update(dlpo.live_buffers())
    pinned_before = dlpo.pinned_nbytes()


def live_buffers() -> list[tuple[str, int]]:
    return list((Counter(dlpo.live_buffers()) - before).elements())


def pinned_nbytes() -> int:
    return dlpo.pinned_nbytes() - pinned_before


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline, f"waited 10 s for {what}"
        time.sleep(0.002)


def is_mapped(pointer: int) -> bool:
    with open("/proc/self/maps") as lines:
        spans = [line.split(maxsplit=1)[0].split("-") for line in lines]
    return any(int(low, 16) <= pointer < int(high, 16) for low, high in spans)


def imports() -> list[lifetime.Resource]:
    return [resource for resource in lifetime.live() if resource.kind == "import"]


# ------------------------------------------------------------------------------------------------- owners


class Freed:
    """A release that remembers that it ran, and on which thread."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __call__(self) -> None:
        self.threads.append(threading.get_ident())

    @property
    def count(self) -> int:
        return len(self.threads)


def test_what_nobody_uses_is_freed_by_the_reclaim_thread() -> None:
    freed = Freed()
    owner = lifetime.own("pageable", 7, freed)
    assert ("pageable", 7) in live_buffers()
    del owner
    wait_until(lambda: freed.count == 1, "the reclaim thread")
    assert freed.threads != [threading.get_ident()]
    assert ("pageable", 7) not in live_buffers()


def test_a_drain_frees_on_the_calling_thread() -> None:
    freed = Freed()
    owner = lifetime.own("pageable", 7, freed)
    with lifetime.lock:  # the reclaim thread cannot be quicker
        del owner
        lifetime.drain()
        assert freed.threads == [threading.get_ident()]


def test_a_reference_outlives_the_owner_and_keeps_the_memory() -> None:
    freed = Freed()
    owner = lifetime.own("pageable", 7, freed)
    reference = owner.reference()
    assert owner.users == 1
    assert lifetime.release_now(owner) is False
    lifetime.drain()
    assert freed.count == 0
    with pytest.raises(RuntimeError):
        owner.reference()
    del reference
    wait_until(lambda: freed.count == 1, "the last reference's end")


def test_release_now_frees_once_on_this_thread() -> None:
    freed = Freed()
    owner = lifetime.own("pageable", 7, freed)
    assert lifetime.release_now(owner) is True
    assert lifetime.release_now(owner) is True
    del owner
    lifetime.drain()
    assert freed.threads == [threading.get_ident()]


def test_reclaims_wait_while_paused_and_follow_afterwards() -> None:
    freed = Freed()
    with lifetime.paused():
        with lifetime.paused():
            owner = lifetime.own("pageable", 7, freed)
            del owner
            lifetime.drain()
        time.sleep(0.05)  # the reclaim thread has had its chance
        assert freed.count == 0
    wait_until(lambda: freed.count == 1, "the end of the pause")


def test_a_release_may_drop_the_last_use_of_something_else() -> None:
    inner, outer = Freed(), Freed()
    held = [lifetime.own("pageable", 1, inner)]

    def release() -> None:
        outer()
        held.clear()
        lifetime.drain()

    owner = lifetime.own("pageable", 2, release)
    lifetime.release_now(owner)
    assert (inner.count, outer.count) == (1, 1)


def test_a_release_may_close_a_buffer_in_the_middle_of_a_registration() -> None:
    """As the garbage collector does when it runs a finalizer on a thread that holds the lock."""

    class Finalizer(CpuDriver):
        victim: dlpo.HostBuffer | None = None

        def host_register(self, pointer: int, nbytes: int, *, read_only: bool = False) -> None:
            if self.victim is not None:
                victim, self.victim = self.victim, None
                victim.close()
            super().host_register(pointer, nbytes, read_only=read_only)

    driver = Finalizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlpoffload.memory.open_driver", lambda device=None: driver)
        driver.victim = victim = dlpo.HostBuffer.allocate(PAGE)
        done = threading.Thread(target=lambda: dlpo.HostBuffer.allocate(PAGE).close(), daemon=True)
        done.start()
        done.join(10)
        assert not done.is_alive(), "deadlock"
    assert victim.closed
    assert pinned_nbytes() == 0


def test_an_owner_that_cannot_be_made_frees_the_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(token: int) -> Any:
        raise MemoryError("no owner")

    freed = Freed()
    monkeypatch.setattr(_native, "Owner", refuse)
    with pytest.raises(MemoryError, match="no owner"):
        lifetime.own("pageable", 7, freed)
    assert freed.count == 1
    assert ("pageable", 7) not in live_buffers()


# ----------------------------------------------------------------------------------------- closing buffers


def test_close_under_live_views_says_how_many_and_leaves_the_buffer_open(device: str) -> None:
    buffer = dlpo.HostBuffer.allocate(PAGE, device=device)
    one = buffer.host_view((4,), "float32")
    with pytest.raises(ClosedError, match=r"^1 live view \(or .*4096 bytes \(4.00 KiB\)"):
        buffer.close()
    two = buffer.host_view((4,), "float32")
    capsule = two.__dlpack__()
    with pytest.raises(ClosedError, match=r"^3 live views"):
        buffer.close()
    assert not buffer.closed
    assert buffer.live_views == 3
    buffer.memoryview()[:2] = b"ok"  # still usable
    assert bytes(one.memoryview()[:2]) == b"ok"
    del one, two, capsule
    buffer.close()
    assert buffer.closed


def test_closing_twice_and_using_a_closed_buffer() -> None:
    buffer = dlpo.HostBuffer.allocate(100, device="cpu")
    buffer.close()
    buffer.close()
    assert buffer.nbytes == 100
    assert repr(buffer) == "<closed host buffer of 100 bytes>"
    for use in (
        lambda: buffer.host_view((1,), "int8"),
        lambda: buffer.device_view((1,), "int8"),
        lambda: buffer.carve({}),
        lambda: buffer.memoryview(),
        lambda: buffer.copy_into(b"1"),
        lambda: buffer.host_pointer,
        lambda: buffer.device_pointer,
        lambda: buffer.live_views,
        lambda: buffer.read_only,
        lambda: buffer.device,
        lambda: buffer.__enter__(),
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_with_closes_and_reports_live_views() -> None:
    with dlpo.HostBuffer.allocate(100, device="cpu") as buffer:
        pass
    assert buffer.closed
    with pytest.raises(ClosedError, match="1 live view"), dlpo.HostBuffer.allocate(100, device="cpu") as buffer:
        view = buffer.host_view((1,), "int8")
    assert not buffer.closed
    del view
    buffer.close()


def test_with_never_hides_the_exception_on_its_way_out() -> None:
    kept: list[dlpo.View] = []
    buffer = dlpo.HostBuffer.allocate(PAGE, device="cpu")
    kept.append(buffer.host_view((1,), "int8"))
    with pytest.raises(KeyError) as caught, buffer:
        raise KeyError("the user's own")
    assert any("1 live view" in note for note in caught.value.__notes__)
    assert buffer.closed
    pointer = kept[0].pointer
    assert is_mapped(pointer)  # the view is still good
    kept.clear()
    wait_until(lambda: not live_buffers(), "the last view's end")
    assert not is_mapped(pointer)


def test_another_thread_may_close() -> None:
    buffer = dlpo.HostBuffer.allocate(PAGE, device="cpu")
    pointer = buffer.host_pointer
    thread = threading.Thread(target=buffer.close)
    thread.start()
    thread.join()
    assert buffer.closed
    assert not is_mapped(pointer)


def test_many_threads_close_one_buffer_once() -> None:
    errors: list[BaseException] = []
    for _ in range(50):
        buffer = dlpo.HostBuffer.allocate(PAGE, device="cpu")
        barrier = threading.Barrier(4)

        def close(buffer: dlpo.HostBuffer = buffer, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                buffer.close()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert live_buffers() == []


def test_views_made_while_another_thread_closes_are_good_or_refused() -> None:
    for _ in range(50):
        buffer = dlpo.HostBuffer.allocate(PAGE, device="cpu")
        buffer.memoryview()[:1] = b"x"
        seen: list[bytes] = []
        barrier = threading.Barrier(2)

        def use(
            buffer: dlpo.HostBuffer = buffer, seen: list[bytes] = seen, barrier: threading.Barrier = barrier
        ) -> None:
            barrier.wait()
            try:
                while True:
                    seen.append(bytes(buffer.memoryview()[:1]))
            except ClosedError:
                pass

        thread = threading.Thread(target=use)
        thread.start()
        barrier.wait()
        while True:
            try:
                buffer.close()
                break
            except ClosedError:
                continue
        thread.join()
        assert set(seen) <= {b"x"}
    wait_until(lambda: not live_buffers(), "the last view's end")


def test_a_buffer_dropped_without_close_is_reclaimed(device: str) -> None:
    buffer = dlpo.HostBuffer.allocate(PAGE, device=device)
    pointer = buffer.host_pointer
    assert open_driver(device).pointer_info(pointer).kind == "pinned"
    del buffer
    wait_until(lambda: not live_buffers(), "the reclaim thread")
    assert pinned_nbytes() == 0
    assert not is_mapped(pointer)


@pytest.mark.parametrize("consumer", ["numpy", "torch"])
def test_ten_thousand_views_dropped_in_any_order_on_several_threads(consumer: str) -> None:
    framework = pytest.importorskip(consumer)
    buffer = dlpo.HostBuffer.allocate(1 << 20, device="cpu")
    views, rounds, workers = 10_000, 10, 4
    errors: list[BaseException] = []
    imported_before = len(imports())

    def work(seed: int) -> None:
        shuffler = random.Random(seed)
        try:
            for _ in range(rounds):
                alive: list[Any] = []
                for i in range(views // rounds // workers):
                    view = buffer.host_view((16,), "float32", byte_offset=64 * shuffler.randrange(1000))
                    alive.append(view)
                    if i % 5:
                        alive.append(framework.from_dlpack(view))
                    else:
                        alive.append(view.__dlpack__(max_version=(1, 0)))  # a capsule that nobody consumes
                    if i % 3 == 0:
                        alive.append(dlpo.view_of(alive[-1]) if i % 5 else view.memoryview())
                    if i % 50 == 0:
                        alive.append(view.__dlpack__(copy=True))
                shuffler.shuffle(alive)
                while alive:
                    alive.pop()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    gc.collect()
    wait_until(lambda: len(imports()) == imported_before, "the imports to be dropped")
    assert buffer.live_views == 0
    assert live_buffers() == [("pinned", 1 << 20)]
    buffer.close()
    assert live_buffers() == []


# ------------------------------------------------------------------------------------- releases that fail


class Refusing(CpuDriver):
    """Refuses to unregister as long as it is told to."""

    refuses = True

    def host_unregister(self, pointer: int) -> None:
        if self.refuses:
            raise RegistrationError("the driver will not unregister")
        super().host_unregister(pointer)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Refusing]:
    driver = Refusing()
    monkeypatch.setattr("dlpoffload.memory.open_driver", lambda device=None: driver)
    yield driver
    driver.refuses = False
    # What a process would keep for good; the next test starts without it.
    for registration in registrations.registrations.ranges:
        registration.count += 1
    while lifetime._kept:
        lifetime._kept.pop().release()
    assert pinned_nbytes() == 0


def test_close_raises_what_the_release_raises_and_keeps_the_memory(refusing: Refusing) -> None:
    buffer = dlpo.HostBuffer.allocate(PAGE)
    pointer = buffer.host_pointer
    with pytest.raises(RegistrationError, match="will not unregister"):
        buffer.close()
    assert buffer.closed
    lifetime.drain()
    assert is_mapped(pointer), "memory that may still be registered was unmapped"
    assert live_buffers() == [("pinned", PAGE)]
    assert pinned_nbytes() == PAGE


def test_a_producer_whose_memory_may_still_be_registered_is_kept(refusing: Refusing) -> None:
    class Memory(bytearray):
        pass

    memory = Memory(2 * PAGE)
    alive = weakref.ref(memory)
    buffer = dlpo.HostBuffer.register(memory)
    with pytest.raises(RegistrationError, match="will not unregister"):
        buffer.close()
    del memory, buffer
    gc.collect()
    lifetime.drain()
    assert alive() is not None


def test_with_adds_a_failing_release_to_the_exception_on_its_way_out(refusing: Refusing) -> None:
    with pytest.raises(KeyError) as caught, dlpo.HostBuffer.allocate(PAGE):
        raise KeyError("the user's own")
    assert any("will not unregister" in note for note in caught.value.__notes__)


def test_a_release_that_fails_in_the_background_is_reported(
    refusing: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reported.append(report.exc_value))
    buffer = dlpo.HostBuffer.allocate(PAGE)
    pointer = buffer.host_pointer
    del buffer
    wait_until(lambda: bool(reported), "the report")
    (error,) = reported
    assert isinstance(error, RegistrationError)
    assert any("stays allocated" in note for note in error.__notes__)
    assert is_mapped(pointer)
    freed = Freed()  # and the thread lives on
    owner = lifetime.own("pageable", 7, freed)
    del owner
    wait_until(lambda: freed.count == 1, "the reclaim thread")


def test_the_default_hook_prints_a_background_failure() -> None:
    result = run_python(
        """
        import time
        from dlpoffload import lifetime

        def release():
            raise ValueError("cannot free this")

        owner = lifetime.own("pageable", 7, release)
        del owner
        lifetime.drain()
        while len(lifetime.live()) != 1: time.sleep(0.001)
        """
    )
    assert result.returncode == 0
    assert "ValueError: cannot free this" in result.stderr


def test_an_interrupted_drain_loses_nothing() -> None:
    freed = Freed()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with lifetime.lock:  # keeps the reclaim thread out
        one = lifetime.own("pageable", 1, interrupted)
        two = lifetime.own("pageable", 2, freed)
        del one
        del two
        with pytest.raises(KeyboardInterrupt):
            lifetime.drain()
        assert freed.count == 0
        lifetime.drain()
        assert freed.count == 1
    assert [resource.nbytes for resource in lifetime._kept] == [1]  # kept and counted
    lifetime._kept.clear()


# ------------------------------------------------------------------------------------- processes that end


def run_python(source: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("consumer", ["numpy", "torch"])
def test_the_interpreter_ends_in_silence_with_views_in_globals(consumer: str) -> None:
    pytest.importorskip(consumer)
    result = run_python(
        f"""
        import threading
        import {consumer} as framework
        import dlpoffload as dlpo

        buffer = dlpo.HostBuffer.allocate(1 << 16, device="cpu")
        view = buffer.host_view((16,), "float32")
        capsule = view.__dlpack__()
        versioned = view.__dlpack__(max_version=(1, 0))
        copied = view.__dlpack__(copy=True)
        tensor = framework.from_dlpack(view)
        back = dlpo.view_of(tensor)
        raw = view.memoryview()
        registered = dlpo.HostBuffer.register(framework.ones(1000), device="cpu")
        cycle = [buffer]
        cycle.append(cycle)
        threading.Thread(target=lambda: framework.from_dlpack(view), daemon=True).start()
        dropped = dlpo.HostBuffer.allocate(1 << 16, device="cpu")
        del dropped
        class Late:
            def __init__(self): self.buffer = dlpo.HostBuffer.allocate(100, device="cpu")
            def __del__(self): self.buffer.close()
        late = Late()
        import atexit
        atexit.register(lambda: dlpo.HostBuffer.allocate(100, device="cpu").close())
        """,
        "-X",
        "dev",
        "-W",
        "error",
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_an_exception_that_ends_the_interpreter_is_all_that_is_said() -> None:
    result = run_python(
        """
        import dlpoffload as dlpo
        view = dlpo.HostBuffer.allocate(1 << 16, device="cpu").host_view((16,), "float32")
        capsule = view.__dlpack__()
        raise SystemExit(3)
        """
    )
    assert (result.returncode, result.stderr) == (3, "")


def test_a_forked_child_ends_cleanly_and_the_parents_buffer_stays() -> None:
    result = run_python(
        """
        import os, sys, time, warnings
        import dlpoffload as dlpo
        from dlpoffload import lifetime

        # Python 3.12 warns of any fork in a process with threads; that it ends well is what is tested here.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        buffer = dlpo.HostBuffer.allocate(1 << 16, device="cpu")
        view = buffer.host_view((4,), "uint8")
        view.memoryview()[:] = b"mine"
        lifetime.lock.acquire()  # as another thread might at the moment of the fork
        child = os.fork()
        if child == 0:
            assert dlpo.live_buffers() == [] and dlpo.pinned_nbytes() == 0
            assert bytes(view.memoryview()) == b"mine"
            view.memoryview()[:] = b"your"  # a copy of the page
            own = dlpo.HostBuffer.allocate(1 << 16, device="cpu")  # the child's memory is freed by the child
            assert dlpo.live_buffers() == [("pinned", 1 << 16)]
            del own
            end = time.monotonic() + 10
            while dlpo.live_buffers():
                assert time.monotonic() < end
                time.sleep(0.001)
            del view
            buffer.close()  # the parent's is left to the parent
            del buffer
            sys.exit(7)
        lifetime.lock.release()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7, status
        assert bytes(view.memoryview()) == b"mine"
        assert dlpo.live_buffers() == [("pinned", 1 << 16)]
        del view
        buffer.close()
        assert dlpo.live_buffers() == [] and dlpo.pinned_nbytes() == 0
        """
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_forked_child_reads_what_it_inherits_of_a_producers_memory() -> None:
    """What the parent registered keeps its producer in the child, too: it was unmapped under the child's views."""
    result = run_python(
        """
        import os, sys, warnings
        import dlpoffload as dlpo
        from dlpoffload import lifetime

        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        nbytes = 64 << 20  # so large that freeing it would unmap it
        buffer = dlpo.HostBuffer.register(bytearray(b"7" * nbytes), device="cpu")
        view = buffer.host_view((nbytes,), "uint8")
        child = os.fork()
        if child == 0:
            lifetime.drain()
            seen = view.memoryview()
            assert dlpo.live_buffers() == []
            sys.exit(7 if seen[0] == seen[-1] == ord("7") else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7, status
        """
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupt_reaches_a_program_that_waits_for_nothing() -> None:
    """The reclaim thread neither takes signals nor keeps the process alive."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import dlpoffload as d, signal, time\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored if in the background
            "b = d.HostBuffer.allocate(100, device='cpu')\n"
            "try:\n"
            "    print('ready', flush=True)\n"
            "    time.sleep(60)\n"
            "except KeyboardInterrupt: raise SystemExit(5)\n",
        ],
        stdout=subprocess.PIPE,
        env=os.environ,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 5
    process.stdout.close()
