"""Arguments of taskiq's own worker, for any of its brokers."""

from benchmarks.jobs.peer import SLOTS


def worker_of(module: str) -> tuple[str, ...]:
    """Return the arguments for Python; taskiq takes uvloop by itself."""
    options = f"--workers 1 --max-async-tasks {SLOTS} --log-level WARNING --shutdown-timeout 2"
    return ("-m", "taskiq", "worker", f"{module}:broker", *options.split())
