"""The Prometheus metrics of an assembly: one registry, merged with others for a scrape."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

from viralfx.telemetry.metrics.requests import AccessMetrics, HttpMetrics, RequestMetrics
from viralfx.telemetry.metrics.series import Exemplar, no_exemplar

_logger = logging.getLogger("viralfx.metrics")


class MetricsRegistry(Protocol):
    """A registry of the library, such as ``prometheus_client.REGISTRY``."""

    def collect(self) -> Iterable[Any]:
        """Return all metrics with their samples."""
        ...


def problems_with_registries(given: object) -> Iterator[str]:
    """Yield the problems of an application's registries."""
    if not isinstance(given, Sequence):
        yield "OperationsConfig.registries: must be a list, as in registries=[REGISTRY]"
        return
    for each in given:
        if isinstance(each, type) or not callable(getattr(each, "collect", None)):
            kind = type(each).__name__
            yield f"OperationsConfig.registries: a {kind} is no registry of prometheus_client"


class MergedRegistries:
    """Shows several registries as one; of two metrics with one name, the first one.

    The library's global registry has metrics of the process and of the interpreter, too. Two
    metrics with one name would make the whole scrape invalid.
    """

    def __init__(self, registries: Sequence[MetricsRegistry]) -> None:
        self._registries = registries
        self._failing: set[int] = set()

    def collect(self) -> Iterator[Metric]:
        """Return the metrics; a registry that raises is left out, and logged once until it works.

        The scrape of the others shows the events meanwhile.
        """
        seen: set[str] = set()
        for place, registry in enumerate(self._registries):
            try:
                found = list(registry.collect())
            except Exception as error:  # a boundary: collectors of the application may raise
                if place == 0:
                    raise
                if place not in self._failing:
                    self._failing.add(place)
                    _logger.warning("A registry cannot be read: %s", error, exc_info=error)
                continue
            self._failing.discard(place)
            for metric in found:
                if metric.name not in seen:
                    seen.add(metric.name)
                    yield metric


class SiblingProcesses:
    """Warns once if other processes of the same server serve the application, too.

    Each scrape of a shared port reaches one of them at random, so its counters seem to jump. The
    processes of one parent claim numbered names of the kernel, which end with the process.
    """

    def __init__(self) -> None:
        self._claims: list[socket.socket] = []

    def warn(self) -> None:
        """Log the warning if this is the second process that calls this."""
        if self._claims or not (sys.platform == "linux" and _is_worker()):
            return
        place = next(
            (n for n in (1, 2) if self._claim(f"viralfx-{os.getuid()}-{os.getppid()}-{n}")), 0
        )
        if place == 2:  # noqa: PLR2004 - the third one need not repeat it
            _logger.warning(
                "Several processes of one server answer on this port: /metrics and /health show"
                " the one that answers; see docs/metrics.md"
            )

    def _claim(self, name: str) -> bool:
        held = socket.socket(socket.AF_UNIX)
        try:
            held.bind(f"\0{name}")
        except OSError:
            held.close()
            return False
        self._claims.append(held)
        return True

    def close(self) -> None:
        """Give the name back."""
        for held in self._claims:
            held.close()
        self._claims.clear()


def _is_worker() -> bool:
    """Return whether a server has made this process as one of its workers."""
    # Not imported: servers that make processes with it have loaded it.
    processes: Any = sys.modules.get("multiprocessing.process")
    made_by_library = processes is not None and processes.parent_process() is not None
    return made_by_library or os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/")


class Metrics:
    """The metrics of one assembly.

    The registry is separate from the library's global one, so that two applications in one process
    do not mix their counts.
    """

    def __init__(
        self, exemplar: Exemplar = no_exemplar, registries: Sequence[MetricsRegistry] = ()
    ) -> None:
        """``exemplar`` returns the labels of an exemplar for the current trace.

        ``registries`` are those of the application, which the rendering shows, too.
        """
        self.registry = CollectorRegistry(auto_describe=True)
        self._whole = MergedRegistries([self.registry, *registries])
        self.exemplar = exemplar
        """The exemplar function, for other metrics of this assembly."""
        self.requests = RequestMetrics(self.registry)
        self.http = HttpMetrics(self.registry)
        self.access = AccessMetrics(self.registry)
        self._rendered: dict[str, bytes] = {}
        """The renderings of the current event loop iteration, by media type."""
        ProcessCollector(registry=self.registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Render all metrics; return the body and its media type.

        ``accept`` is the ``Accept`` header. It selects OpenMetrics with exemplars or the older text
        format, which is also the answer to unknown versions. Requests in the same iteration of the
        event loop share one rendering, so that a flood of scrapes costs a single rendering.
        """
        try:
            encode, media_type = choose_encoder(accept)
        except (TypeError, ValueError):  # the library does not validate the version
            encode, media_type = choose_encoder("")
        body = self._rendered.get(media_type)
        if body is None:
            body = encode(self._whole)
            with suppress(RuntimeError):  # no event loop runs
                asyncio.get_running_loop().call_soon(self._rendered.clear)
                self._rendered[media_type] = body
        return body, media_type
