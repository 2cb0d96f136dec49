"""Measures the cost of metrics, access log and traces for an ordinary handler, layer by layer."""

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import publish, target_table
from benchmarks.rounds import READING, Subject, how, measure, subject_table, target
from benchmarks.servers import viralfx

PATH = "/work"
NOTHING = Subject(viralfx("all off", "benchmarks.peers.silent"), PATH)
METRICS = Subject(viralfx("metrics", "benchmarks.peers.mounted", ACCESS_LOG="false"), PATH)
LOGS = Subject(viralfx("metrics, JSON log", "benchmarks.peers.mounted"), PATH)
SAMPLED = "0.01"
ROUNDS = 21
"""More rounds than elsewhere, because the differences are only a few percent."""


class _Blackhole(BaseHTTPRequestHandler):
    """Accepts every request."""

    def do_POST(self) -> None:
        """Answer 200."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name
        """Log nothing."""


@contextmanager
def _receiver() -> Iterator[str]:
    """Run a trace receiver that stores nothing; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Blackhole) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _traced(endpoint: str) -> Subject:
    program = viralfx(
        "metrics, JSON log, traces at 1 %",
        "benchmarks.peers.mounted",
        OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_TRACES_SAMPLER="parentbased_traceidratio",
        OTEL_TRACES_SAMPLER_ARG=SAMPLED,
    )
    return Subject(program, PATH)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, publish, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--endpoint", help="a receiver of traces (default: one that keeps nothing)")
    options = parser.parse_args(arguments)
    with _receiver() as blackhole:
        traced = _traced(options.endpoint or blackhole)
        subjects = (NOTHING, METRICS, LOGS, traced)
        rounds = measure(subjects, options.rounds)
    targets = [
        target(rounds, METRICS, NOTHING, 0.90),
        target(rounds, LOGS, NOTHING, 0.90),
        target(rounds, traced, NOTHING, 0.80),
    ]
    lines = [
        *how(rounds, "python benchmarks/telemetry.py"),
        "",
        *subject_table(rounds, subjects),
        "",
        *target_table(targets),
        "",
        READING,
    ]
    return publish("telemetry.py", lines, targets, check=options.check)


if __name__ == "__main__":
    sys.exit(main())
