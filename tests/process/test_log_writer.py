"""Tests of the log writer with real descriptors: order, loss and closed pipes."""

import contextlib
import fcntl
import gc
import os
import pty
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.process.shortages import descriptors_used_up, needs_many, no_more_threads
from tests.servers.waiting import wait_until

from viralfx.telemetry.logging.writer import LineWriter, Output, max_write_bytes


@dataclass
class Pipe:
    """A pipe of 4096 bytes that the test reads."""

    reader: int
    writer: int
    read: bytes = b""

    def take(self) -> bytes:
        """Read the available bytes and return everything read so far."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.reader, 65536):
                self.read += chunk
        return self.read


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Return a small pipe with a non-blocking reader."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(reader, False)
    yield Pipe(reader, writer)
    for descriptor in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def lost_line(count: int) -> bytes:
    """Render the warning about lost lines."""
    return b"lost %d\n" % count


def assert_order_of_threads(pipe: Pipe, write: Callable[[int, bytes], None]) -> None:
    """Write 2,500 numbered lines in each of four threads, and compare their order in the pipe."""

    def run(name: int) -> None:
        for number in range(2500):
            write(number, b"%d %d\n" % (name, number))

    threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: pipe.take().count(b"\n") == 10_000, what="all lines")
    for thread in threads:
        thread.join()
    lines = pipe.read.splitlines()

    for name in range(4):
        mine = [line for line in lines if line.startswith(b"%d " % name)]
        assert mine == [b"%d %d" % (name, number) for number in range(2500)]


def test_lines_are_written_whole_and_in_order(pipe: Pipe) -> None:
    """Four threads write ten thousand lines; the order within each thread is kept."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)

    assert_order_of_threads(pipe, lambda _, line: writer.write(line))
    writer.close()


def test_deferred_lines_keep_their_order(pipe: Pipe) -> None:
    """This holds relative to other lines, from four threads, and before a flush returns."""
    batches: list[int] = []

    def make(items: Sequence[bytes]) -> bytes:
        batches.append(len(items))
        return b"".join(items)

    writer = LineWriter(pipe.writer, lost_warning=lost_line, render_deferred=make)

    def write(number: int, line: bytes) -> None:
        if number % 50:
            writer.write_later(line)
        else:
            writer.write(line)

    assert_order_of_threads(pipe, write)
    assert sum(batches) == 10_000 - 4 * 50
    assert len(batches) < 3000
    writer.close()
    writer.write_later(b"afterwards\n")
    assert pipe.take().endswith(b"afterwards\n")


def test_a_line_does_not_overtake_lines_being_rendered(pipe: Pipe) -> None:
    """It waits for another thread's rendering."""
    making, go_on = threading.Event(), threading.Event()

    def make(items: Sequence[bytes]) -> bytes:
        making.set()
        assert go_on.wait(5)
        return b"".join(items)

    writer = LineWriter(pipe.writer, lost_warning=lost_line, render_deferred=make)
    writer.write_later(b"first\n")
    assert making.wait(5)  # the writer's own thread renders it
    second = threading.Thread(target=writer.write, args=(b"second\n",))
    second.start()
    go_on.set()
    second.join()
    assert writer.flush()

    assert pipe.take() == b"first\nsecond\n"
    writer.close()


def test_logging_during_rendering_does_not_deadlock(pipe: Pipe) -> None:
    """A finalizer or a signal handler may log on the same thread."""

    def make(items: Sequence[bytes]) -> bytes:
        if items[0] == b"0\n":
            writer.write(b"from within\n")
            writer.write_later(b"later from within\n")
        return b"".join(items)

    def write() -> None:
        for number in range(32):
            writer.write_later(b"%d\n" % number)

    writer = LineWriter(pipe.writer, lost_warning=lost_line, render_deferred=make)
    loop = threading.Thread(target=write, daemon=True)
    loop.start()
    loop.join(5)
    assert not loop.is_alive()
    wait_until(lambda: pipe.take().count(b"\n") == 34, what="all lines")
    writer.close()


def test_a_finalizer_may_log_at_any_point(pipe: Pipe) -> None:
    """This includes the time between dequeuing and writing."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    numbers = iter(range(5000))

    def log(phase: str, _info: dict[str, int]) -> None:
        if phase == "stop" and (number := next(numbers, None)) is not None:
            writer.write(b"%d\n" % number)

    def write() -> None:
        while next(numbers, None) is not None:
            writer.write(b"line\n", urgent=True)

    before = gc.get_threshold()
    gc.callbacks.append(log)
    gc.freeze()  # or each collection would take long
    gc.set_threshold(1)
    try:
        loop = threading.Thread(target=write, daemon=True)
        loop.start()
        wait_until(lambda: pipe.take() is not None and not loop.is_alive(), what="the end")
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(log)
        gc.unfreeze()
    wait_until(lambda: pipe.take().count(b"\n") == 5000, what="all lines")
    writer.close()


def test_a_single_deferred_line_is_written_soon(pipe: Pipe) -> None:
    """It needs no further line to be written."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    for number in range(3):
        writer.write_later(b"%d\n" % number)
        wait_until(lambda: pipe.take().endswith(b"%d\n" % number), what="the line")  # noqa: B023

    writer.write_later(b"last\n")
    assert writer.flush()
    assert pipe.take().endswith(b"last\n")
    writer.close()


def test_items_that_cannot_be_rendered_are_counted(pipe: Pipe) -> None:
    """The caller gets no exception, and later lines are written."""

    def make(items: Sequence[bytes]) -> bytes:
        raise ValueError(items)

    writer = LineWriter(pipe.writer, lost_warning=lost_line, render_deferred=make)
    for _ in range(3):
        writer.write_later(b"never\n")
    writer.write(b"after\n")

    assert writer.flush()
    assert pipe.take() == b"after\nlost 3\n"
    assert (writer.lost, writer.lost_total) == (0, 3)
    writer.close()


def test_the_last_losses_are_reported_at_close(pipe: Pipe) -> None:
    """No further line may come that the report could follow."""

    def make(items: Sequence[bytes]) -> bytes:
        raise ValueError(items)

    writer = LineWriter(pipe.writer, lost_warning=lost_line, render_deferred=make)
    writer.write(b"before\n")
    assert writer.flush()
    for _ in range(3):
        writer.write_later(b"never\n")
    writer.close()

    assert pipe.take() == b"before\nlost 3\n"
    assert writer.lost == 0


def test_losses_are_reported_without_a_writer_thread(pipe: Pipe) -> None:
    """No line was written, so the thread was never started."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    writer.count_lost(2)
    writer.close()

    assert pipe.take() == b"lost 2\n"


def test_close_does_not_wait_for_a_blocked_reader(pipe: Pipe) -> None:
    """The report is dropped, and the process ends."""
    os.write(pipe.writer, b"x" * 4096)
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    writer.count_lost(2)
    ending = threading.Thread(target=writer.close, daemon=True)
    ending.start()
    ending.join(10)

    assert not ending.is_alive()
    assert writer.lost == writer.lost_total == 2
    assert pipe.take() == b"x" * 4096


def test_lines_are_split_into_atomic_writes(pipe: Pipe) -> None:
    """A pipe does not mix such writes with those of other processes."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    lines = [b"%d" % number * 900 + b"\n" for number in range(9)]
    for line in lines:
        writer.write_later(line)
    wait_until(lambda: pipe.take().count(b"\n") == 9, what="all lines")

    assert pipe.read == b"".join(lines)
    writer.close()


def test_a_write_to_a_file_is_larger_than_to_a_pipe(pipe: Pipe, tmp_path: Path) -> None:
    """Every write has a cost, and no other process writes in between."""
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = LineWriter(descriptor, lost_warning=lost_line)
    lines = [b"%04d" % number * 100 + b"\n" for number in range(1000)]
    for line in lines:
        writer.write_later(line)
    assert writer.flush()
    writer.close()

    assert (tmp_path / "log").read_bytes() == b"".join(lines)
    assert max_write_bytes(descriptor) > max_write_bytes(pipe.writer) == select.PIPE_BUF
    os.close(descriptor)
    assert max_write_bytes(descriptor) == select.PIPE_BUF


def test_a_steady_stream_of_lines_is_written_soon(tmp_path: Path) -> None:
    """Lines do not wait until a whole chunk has gathered."""
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = LineWriter(descriptor, lost_warning=lost_line)
    pace, brought = threading.Event(), 0
    while os.fstat(descriptor).st_size == 0 and brought < max_write_bytes(descriptor) // 2:
        writer.write(b"x" * 19 + b"\n")
        writer.write_later(b"y" * 19 + b"\n")
        brought += 40
        pace.wait(0.001)  # simulates the pace of requests
    soon = os.fstat(descriptor).st_size > 0
    writer.close()
    os.close(descriptor)

    assert soon
    assert (tmp_path / "log").read_bytes() == (b"x" * 19 + b"\n" + b"y" * 19 + b"\n") * (
        brought // 40
    )


def test_a_blocked_reader_delays_no_caller_and_loses_new_lines(pipe: Pipe) -> None:
    """The queue is bounded; dropped lines are counted and reported later."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line, max_waiting_bytes=100_000)
    # The pipe is not read meanwhile: a writer that waited for the reader would block here.
    for number in range(20_000):
        writer.write(b"line %05d\n" % number)
    assert not writer.flush(0.05)
    wait_until(lambda: b"lost" in pipe.take(), what="the loss is reported")
    wait_until(lambda: pipe.take() and writer.flush(0.01), what="the rest")
    lines = pipe.take().splitlines()
    lost = sum(int(line.removeprefix(b"lost ")) for line in lines if line.startswith(b"lost "))
    kept = [line for line in lines if line.startswith(b"line ")]
    assert 5000 < lost < 11_000
    assert len(kept) + lost == 20_000
    assert kept == sorted(kept)
    writer.close()


@pytest.mark.parametrize("later", [False, True])
def test_a_stopped_terminal_delays_no_caller(*, later: bool) -> None:
    """Examples are Ctrl-S, and a container's terminal without a reader."""
    master, terminal = pty.openpty()
    writer = LineWriter(terminal, lost_warning=lost_line)
    lines = [b"line %05d %s\n" % (number, b"x" * 99) for number in range(3000)]

    def log() -> None:
        for line in lines:
            if later:
                writer.write_later(line)
            else:
                writer.write(line)

    loop = threading.Thread(target=log, daemon=True)
    loop.start()
    loop.join(10)
    stood_still = loop.is_alive()
    read = b""
    while read.count(b"\n") < len(lines) and select.select([master], [], [], 10)[0]:
        read += os.read(master, 65536)
    writer.close()
    os.close(master)
    os.close(terminal)

    assert not stood_still
    assert read.replace(b"\r", b"") == b"".join(lines)


def test_flush_times_out_only_once(pipe: Pipe) -> None:
    """A process with a blocked log ends one second later, not two."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    for _ in range(1000):
        writer.write(b"x" * 99 + b"\n")
    began = time.monotonic()

    assert not writer.flush(0.2)
    assert not writer.flush(30.0)
    writer.close()
    assert time.monotonic() - began < 15.0
    pipe.take()  # unblocks the thread


def test_a_closed_pipe_loses_only_lines(pipe: Pipe) -> None:
    """The reader has closed its end."""
    os.close(pipe.reader)
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    for _ in range(1000):
        writer.write(b"x\n")
    wait_until(lambda: writer.flush() and writer.lost, what="all lost")

    assert writer.lost == 1000
    writer.close()


def test_a_full_disk_loses_only_lines() -> None:
    """The test writes to a device that is always full."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(descriptor, lost_warning=lost_line)
    writer.write(b"one\n")
    writer.write(b"two\n")

    assert writer.flush()
    assert writer.lost == 2
    writer.close()
    assert writer.lost == 2
    os.close(descriptor)


def test_a_partial_line_ends_before_the_next_line(tmp_path: Path) -> None:
    """When the disk has space again, the next line is whole, and the loss is reported."""
    import resource  # noqa: PLC0415 - a limit stands in for a disk
    import signal  # noqa: PLC0415

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = LineWriter(descriptor, lost_warning=lost_line)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        writer.write(b"first\n")
        assert writer.flush()
        writer.write(b"second is too long\n")
        assert writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    writer.write(b"third\n")
    assert writer.flush()
    writer.close()
    os.close(descriptor)

    assert (tmp_path / "log").read_bytes() == b"first\nseco\nthird\nlost 1\n"


def test_a_non_blocking_descriptor_loses_no_lines(pipe: Pipe) -> None:
    """Another process that shares the terminal or pipe may set this mode."""
    os.set_blocking(pipe.writer, False)
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    for _ in range(1000):
        writer.write(b"x" * 99 + b"\n")
    wait_until(lambda: len(pipe.take()) == 100_000, what="all lines")

    assert writer.lost == 0
    writer.close()


@needs_many
def test_waiting_works_with_descriptors_above_1023(pipe: Pipe) -> None:
    """A thousand clients occupy the lower descriptors."""
    with descriptors_used_up() as opened:
        os.dup2(pipe.writer, opened[-1])
        os.set_blocking(opened[-1], False)
        output, computed = Output(opened[-1]), []

        def write() -> None:
            began = time.thread_time()
            output.write(b"x" * 8191 + b"\n")
            computed.append(time.thread_time() - began)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(0.5)  # the pipe is not read meanwhile
        assert thread.is_alive()
        wait_until(lambda: len(pipe.take()) == 8192, what="all that was written")
        thread.join(5)

    assert computed[0] < 0.1


def test_an_urgent_line_is_written_at_once(pipe: Pipe) -> None:
    """Other lines wait a moment to be gathered."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    writer.write(b"error\n", urgent=True)
    wait_until(lambda: pipe.take() == b"error\n", what="the line")

    writer.close()


# A thread runs, as in the program: the child must not start one.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_writes_only_its_own_lines(pipe: Pipe) -> None:
    """It has no writer thread, and the parent writes the queued lines."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    writer.write(b"parent\n")
    child = os.fork()
    if child == 0:
        writer.write(b"child\n")
        os._exit(0)
    os.waitpid(child, 0)

    assert writer.flush()
    assert sorted(pipe.take().splitlines()) == [b"child", b"parent"]
    writer.close()


def test_lines_after_a_timed_out_close_are_written(pipe: Pipe) -> None:
    """The reader continues, and the writer's thread has ended."""
    before = set(threading.enumerate())
    os.write(pipe.writer, b"x" * 4095 + b"\n")
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    writer.write(b"line\n", urgent=True)
    (thread,) = set(threading.enumerate()) - before
    writer.close()
    wait_until(lambda: pipe.take().endswith(b"line\n"), what="the line")
    thread.join(5)

    writer.write(b"afterwards\n")
    assert pipe.take().endswith(b"afterwards\n")


def test_lines_after_close_are_written(pipe: Pipe) -> None:
    """The callers write them, because the thread has ended."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    writer.write(b"before\n")
    writer.close()
    writer.write(b"after\n")

    assert pipe.take() == b"before\nafter\n"


def test_flush_without_a_thread_respects_its_timeout(pipe: Pipe) -> None:
    """This holds for a reader that is slow but never stops."""
    os.write(pipe.writer, b"x" * 4096)
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    enough = threading.Event()

    def read_slowly() -> None:
        while not enough.wait(0.15):
            pipe.read += os.read(pipe.reader, 4096)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    with no_more_threads():
        for _ in range(100):
            writer.write(b"x" * 4095 + b"\n")
        began = time.monotonic()
        done = writer.flush(0.4)
        took = time.monotonic() - began
    enough.set()
    reader.join()

    assert not done
    assert took < 10  # all of them take 15 s
    # Each round empties the pipe, which one line fills.
    while not writer.flush(0.01) and pipe.read.count(b"\n") < 100:
        pipe.take()
    assert pipe.take().count(b"\n") == 100
    writer.close()


def test_without_a_thread_no_line_is_lost(pipe: Pipe) -> None:
    """Each line tries to start the thread; until then callers write full chunks and flushes."""
    writer = LineWriter(pipe.writer, lost_warning=lost_line)
    with no_more_threads():
        writer.write_later(b"later\n")
        writer.write(b"first\n")
        pipe.take()
        assert writer.flush()
        assert pipe.take() == b"later\nfirst\n"
        for _ in range(10):
            writer.write(b"%s\n" % (b"x" * 999))
            pipe.take()
        assert pipe.read.count(b"\n") == 2 + 8
        writer.write_later(b"last\n")
    writer.write_later(b"with a thread\n")

    wait_until(
        lambda: pipe.take().endswith(b"x\nlast\nwith a thread\n"), what="all lines, in order"
    )
    assert pipe.read.count(b"\n") == 2 + 10 + 2
    writer.close()
