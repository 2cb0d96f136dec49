"""The writer of log lines: order, loss and the ends of pipes, with real descriptors."""

import contextlib
import fcntl
import gc
import os
import pty
import select
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.servers.waiting import wait_until
from tests.system.service import percentile
from tests.unit.shortages import descriptors_used_up, no_more_threads

from viralfx.telemetry.line_writer import LineWriter
from viralfx.telemetry.writes import Output, at_once


@dataclass
class Pipe:
    """A pipe of 4096 bytes that the test reads."""

    reader: int
    writer: int
    read: bytes = b""

    def take(self) -> bytes:
        """Read what is there and return everything so far."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.reader, 65536):
                self.read += chunk
        return self.read


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Return a small pipe whose reader never waits."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(reader, False)
    yield Pipe(reader, writer)
    for descriptor in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def lost_line(count: int) -> bytes:
    """Say how many lines were lost."""
    return b"lost %d\n" % count


def test_lines_are_written_whole_and_in_order(pipe: Pipe) -> None:
    """Ten thousand from four threads, each thread's in its own order."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)

    def write(name: int) -> None:
        for number in range(2500):
            writer.write(b"%d %d\n" % (name, number))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: pipe.take().count(b"\n") == 10_000, what="all lines")
    for thread in threads:
        thread.join()
    lines = pipe.read.splitlines()

    for name in range(4):
        mine = [line for line in lines if line.startswith(b"%d " % name)]
        assert mine == [b"%d %d" % (name, number) for number in range(2500)]
    writer.close()


def test_lines_that_are_made_together_keep_their_place(pipe: Pipe) -> None:
    """Among those that were made already, from four threads, and before a flush is over."""
    batches: list[int] = []

    def make(items: Sequence[bytes]) -> bytes:
        batches.append(len(items))
        return b"".join(items)

    writer = LineWriter(pipe.writer, tell_lost=lost_line, make=make)

    def write(name: int) -> None:
        for number in range(2500):
            line = b"%d %d\n" % (name, number)
            if number % 50:
                writer.write_later(line)
            else:
                writer.write(line)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: pipe.take().count(b"\n") == 10_000, what="all lines")
    for thread in threads:
        thread.join()
    lines = pipe.read.splitlines()

    for name in range(4):
        mine = [line for line in lines if line.startswith(b"%d " % name)]
        assert mine == [b"%d %d" % (name, number) for number in range(2500)]
    assert sum(batches) == 10_000 - 4 * 50
    assert len(batches) < 3000
    writer.close()
    writer.write_later(b"afterwards\n")
    assert pipe.take().endswith(b"afterwards\n")


def test_a_line_does_not_overtake_those_that_are_being_made(pipe: Pipe) -> None:
    """However long that takes in another thread."""
    making, go_on = threading.Event(), threading.Event()

    def make(items: Sequence[bytes]) -> bytes:
        making.set()
        assert go_on.wait(5)
        return b"".join(items)

    writer = LineWriter(pipe.writer, tell_lost=lost_line, make=make)
    writer.write_later(b"first\n")
    assert making.wait(5)  # the writer's own thread makes it
    second = threading.Thread(target=writer.write, args=(b"second\n",))
    second.start()
    go_on.set()
    second.join()
    assert writer.flush()

    assert pipe.take() == b"first\nsecond\n"
    writer.close()


def test_who_logs_while_lines_are_made_does_not_wait_for_itself(pipe: Pipe) -> None:
    """A finalizer that the garbage collector calls, or the handler of a signal."""

    def make(items: Sequence[bytes]) -> bytes:
        if items[0] == b"0\n":
            writer.write(b"from within\n")
            writer.write_later(b"later from within\n")
        return b"".join(items)

    def write() -> None:
        for number in range(32):
            writer.write_later(b"%d\n" % number)

    writer = LineWriter(pipe.writer, tell_lost=lost_line, make=make)
    loop = threading.Thread(target=write, daemon=True)
    loop.start()
    loop.join(5)
    assert not loop.is_alive()
    wait_until(lambda: pipe.take().count(b"\n") == 34, what="all lines")
    writer.close()


def test_a_finalizer_may_log_wherever_it_is_called(pipe: Pipe) -> None:
    """Also between taking lines and writing them."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
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


def test_a_single_line_that_is_made_later_is_written_soon(pipe: Pipe) -> None:
    """Nobody has to bring another one."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    for number in range(3):
        writer.write_later(b"%d\n" % number)
        wait_until(lambda: pipe.take().endswith(b"%d\n" % number), what="the line")  # noqa: B023

    writer.write_later(b"last\n")
    assert writer.flush()
    assert pipe.take().endswith(b"last\n")
    writer.close()


def test_what_cannot_be_made_into_lines_is_counted(pipe: Pipe) -> None:
    """Nobody fails for it, and what comes after it is written."""

    def make(items: Sequence[bytes]) -> bytes:
        raise ValueError(items)

    writer = LineWriter(pipe.writer, tell_lost=lost_line, make=make)
    for _ in range(3):
        writer.write_later(b"never\n")
    writer.write(b"after\n")

    assert writer.flush()
    assert pipe.take() == b"after\nlost 3\n"
    writer.close()


def test_what_was_lost_last_is_told_of_at_the_end(pipe: Pipe) -> None:
    """There may be no line any more that it could be told of after."""

    def make(items: Sequence[bytes]) -> bytes:
        raise ValueError(items)

    writer = LineWriter(pipe.writer, tell_lost=lost_line, make=make)
    writer.write(b"before\n")
    assert writer.flush()
    for _ in range(3):
        writer.write_later(b"never\n")
    writer.close()

    assert pipe.take() == b"before\nlost 3\n"
    assert writer.lost == 0


def test_what_was_lost_is_told_of_also_where_nothing_was_ever_written(pipe: Pipe) -> None:
    """There is no thread then."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    writer.count_lost(2)
    writer.close()

    assert pipe.take() == b"lost 2\n"


def test_the_end_waits_for_nobody_who_does_not_read_of_what_was_lost(pipe: Pipe) -> None:
    """It is not told of then, and a process that ends does not hang for it."""
    os.write(pipe.writer, b"x" * 4096)
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    writer.count_lost(2)
    ending = threading.Thread(target=writer.close, daemon=True)
    ending.start()
    ending.join(10)

    assert not ending.is_alive()
    assert writer.lost == 2
    assert pipe.take() == b"x" * 4096


def test_lines_too_long_to_be_written_together_are_written_one_by_one(pipe: Pipe) -> None:
    """Of what a pipe takes at once nothing is mixed with what others write into it."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    lines = [b"%d" % number * 900 + b"\n" for number in range(9)]
    for line in lines:
        writer.write_later(line)
    wait_until(lambda: pipe.take().count(b"\n") == 9, what="all lines")

    assert pipe.read == b"".join(lines)
    writer.close()


def test_a_file_takes_more_at_a_time_than_a_pipe(pipe: Pipe, tmp_path: Path) -> None:
    """Each write costs it, and nobody else writes between two halves of one."""
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = LineWriter(descriptor, tell_lost=lost_line)
    lines = [b"%04d" % number * 100 + b"\n" for number in range(1000)]
    for line in lines:
        writer.write_later(line)
    assert writer.flush()
    writer.close()

    assert (tmp_path / "log").read_bytes() == b"".join(lines)
    assert at_once(descriptor) > at_once(pipe.writer) == select.PIPE_BUF
    os.close(descriptor)
    assert at_once(descriptor) == select.PIPE_BUF


def test_lines_of_both_kinds_are_written_soon(tmp_path: Path) -> None:
    """Though more of them keep coming: nobody waits until a whole write has gathered."""
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = LineWriter(descriptor, tell_lost=lost_line)
    pace, brought = threading.Event(), 0
    while os.fstat(descriptor).st_size == 0 and brought < at_once(descriptor) // 2:
        writer.write(b"x" * 19 + b"\n")
        writer.write_later(b"y" * 19 + b"\n")
        brought += 40
        pace.wait(0.001)  # as requests come, one after another
    soon = os.fstat(descriptor).st_size > 0
    writer.close()
    os.close(descriptor)

    assert soon
    assert (tmp_path / "log").read_bytes() == (b"x" * 19 + b"\n" + b"y" * 19 + b"\n") * (
        brought // 40
    )


def test_a_reader_that_stops_reading_delays_nobody_and_loses_the_latest(pipe: Pipe) -> None:
    """The queue is bounded, what does not fit is counted, and told when it can be."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line, most_waiting=100_000)
    took = []
    for number in range(20_000):
        began = time.perf_counter()
        writer.write(b"line %05d\n" % number)
        took.append(time.perf_counter() - began)
    # Nobody reads meanwhile: who waited for that would be one of the many, or wait for ever.
    assert percentile(took, 0.99) < 0.01
    assert not writer.flush(0.05)
    wait_until(lambda: b"lost" in pipe.take(), what="the loss is told")
    wait_until(lambda: pipe.take() and writer.flush(0.01), what="the rest")
    lines = pipe.take().splitlines()
    lost = sum(int(line.removeprefix(b"lost ")) for line in lines if line.startswith(b"lost "))
    kept = [line for line in lines if line.startswith(b"line ")]
    assert 5000 < lost < 11_000
    assert len(kept) + lost == 20_000
    assert kept == sorted(kept)
    writer.close()


@pytest.mark.parametrize("later", [False, True])
def test_a_terminal_that_stands_still_delays_nobody(*, later: bool) -> None:
    """As after Ctrl-S, or where nobody reads what a container with a terminal says."""
    master, terminal = pty.openpty()
    writer = LineWriter(terminal, tell_lost=lost_line)
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


def test_flush_waits_in_vain_once(pipe: Pipe) -> None:
    """A process whose log nobody reads ends a moment later, and not two."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    for _ in range(1000):
        writer.write(b"x" * 99 + b"\n")
    began = time.monotonic()

    assert not writer.flush(0.2)
    assert not writer.flush(30.0)
    writer.close()
    assert time.monotonic() - began < 2.0
    pipe.take()  # lets the thread end


def test_a_closed_pipe_costs_lines_only(pipe: Pipe) -> None:
    """Whoever read went away for good."""
    os.close(pipe.reader)
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    for _ in range(1000):
        writer.write(b"x\n")
    wait_until(lambda: writer.flush() and writer.lost, what="all lost")

    assert writer.lost == 1000
    writer.close()


def test_a_full_disk_costs_lines_only() -> None:
    """As a device shows that is always full."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(descriptor, tell_lost=lost_line)
    writer.write(b"one\n")
    writer.write(b"two\n")

    assert writer.flush()
    assert writer.lost == 2
    writer.close()
    assert writer.lost == 2
    os.close(descriptor)


def test_a_line_that_was_cut_off_ends_before_the_next(tmp_path: Path) -> None:
    """When the disk has room again, the next line is whole, and the loss is told."""
    import resource  # noqa: PLC0415 - a limit stands in for a disk
    import signal  # noqa: PLC0415

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = LineWriter(descriptor, tell_lost=lost_line)
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


def test_a_descriptor_that_somebody_made_non_blocking_is_waited_for(pipe: Pipe) -> None:
    """Who shares the terminal or pipe with us may do that; nothing is lost by it."""
    os.set_blocking(pipe.writer, False)
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    for _ in range(1000):
        writer.write(b"x" * 99 + b"\n")
    wait_until(lambda: len(pipe.take()) == 100_000, what="all lines")

    assert writer.lost == 0
    writer.close()


def test_what_is_waited_for_beside_a_thousand_clients_costs_nothing(pipe: Pipe) -> None:
    """Whose descriptors leave none below 1024."""
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
        thread.join(0.5)  # nobody reads so long
        assert thread.is_alive()
        wait_until(lambda: len(pipe.take()) == 8192, what="all that was written")
        thread.join(5)

    assert computed[0] < 0.1


def test_an_urgent_line_is_written_at_once(pipe: Pipe) -> None:
    """Others wait a moment for more of them."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    writer.write(b"error\n", urgent=True)
    wait_until(lambda: pipe.take() == b"error\n", what="the line")

    writer.close()


# A thread runs, as it does in the program: the child is one that starts none.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_writes_its_own_lines_only(pipe: Pipe) -> None:
    """It has no thread of ours, and what waits in the parent is the parent's to write."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    writer.write(b"parent\n")
    child = os.fork()
    if child == 0:
        writer.write(b"child\n")
        os._exit(0)
    os.waitpid(child, 0)

    assert writer.flush()
    assert sorted(pipe.take().splitlines()) == [b"child", b"parent"]
    writer.close()


def test_lines_after_an_end_that_could_not_wait_are_still_written(pipe: Pipe) -> None:
    """Once the reader has read on, and the writer's thread is gone."""
    before = set(threading.enumerate())
    os.write(pipe.writer, b"x" * 4095 + b"\n")
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    writer.write(b"line\n", urgent=True)
    (thread,) = set(threading.enumerate()) - before
    writer.close()
    wait_until(lambda: pipe.take().endswith(b"line\n"), what="the line")
    thread.join(5)

    writer.write(b"afterwards\n")
    assert pipe.take().endswith(b"afterwards\n")


def test_lines_after_the_end_are_still_written(pipe: Pipe) -> None:
    """By who brings them: the thread is gone, and the interpreter may say something yet."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    writer.write(b"before\n")
    writer.close()
    writer.write(b"after\n")

    assert pipe.take() == b"before\nafter\n"


def test_without_room_for_a_thread_a_flush_waits_no_longer_than_it_may(pipe: Pipe) -> None:
    """Also where somebody reads all the time, but slowly."""
    os.write(pipe.writer, b"x" * 4096)
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
    enough = threading.Event()

    def read_slowly() -> None:
        while not enough.wait(0.15):
            pipe.read += os.read(pipe.reader, 4096)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    with no_more_threads():
        for _ in range(20):
            writer.write(b"x" * 4095 + b"\n")
        began = time.monotonic()
        done = writer.flush(0.4)
        took = time.monotonic() - began
    enough.set()
    reader.join()

    assert not done
    assert took < 1.2
    wait_until(lambda: pipe.take() and writer.flush(0.01), what="the rest")
    writer.close()


def test_without_room_for_a_thread_nobody_fails_and_nothing_is_lost(pipe: Pipe) -> None:
    """Each line tries again; until then who fills a write writes, and whoever flushes."""
    writer = LineWriter(pipe.writer, tell_lost=lost_line)
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
