"""Jobs that go wrong, and the documented end of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.servers.postgres import Database

CULPRITS, OLDER, NEWER = (f"tests.system.{name}_tasks" for name in ("culprit", "older", "newer"))
"""The modules of their tasks; those of two versions differ in a task and in a payload."""


@dataclass(frozen=True)
class Culprit:
    """A job that goes wrong, and its documented end."""

    task: str
    payload: object
    state: str = "failed"
    code: str | None = "result"

    def __str__(self) -> str:
        return f"{self.task.partition('.')[2]}-{self.payload}"


def _each(task: str, *payloads: object, **end: Any) -> list[Culprit]:
    return [Culprit(f"culprits.{task}", payload, **end) for payload in payloads]


STORED: dict[str, Any] = {"state": "completed", "code": None}
CONTENT = [
    *_each("big", *([60] * 10)),
    *_each("deep", 100_000),
    *_each("recursive", 100_000),
    *_each("text", "surrogate", "raw nul", "not utf-8", "not json", "two values", "nothing"),
    *_each("text", "raw nan", "raw surrogate"),
    *_each("text", "nul", "nan", "infinity", "1e400", **STORED),
    *_each("object", "generator", "cycle", "unknown", "raises", "exits", "interrupts"),
]
CODE = [
    *_each("swallow", None, code="timeout"),
    *_each("stuck", 4.0, code="timeout"),
    *_each("spawn", 100, **STORED),
    *_each("end", "system exit", "interrupt", code="error"),
    *_each("exit_beside", "task", "interrupted task", "gather", "group", code="error"),
    *_each("exit_beside", "dropped task", "callback", "timer", "thread", **STORED),
    *_each("exit_beside", "done callback", "closed callback", **STORED),
    *_each("exit_in_loop", None, code="error"),
    *_each("fail_beside", "task", "callback", **STORED),
    *_each("unreadable", "class", "text", "snooze of a timedelta", code="error"),
    *_each("badly_retried", None, code="error"),
    *_each("cancel", "raised", "of itself", code="error"),
    *_each("fork", "the child ends", "the child goes on", **STORED),
    *_each("fork_in_thread", "the child ends", "the child goes on", **STORED),
    *_each("end_thread", None, code="error"),
    *_each("vanish", None, code="timeout"),
    *_each("exhaust", None, code="error"),
]


@contextmanager
def refusing(database: Database, task: str, *states: str) -> Iterator[None]:
    """Refuse a task's outcomes, those in ``states`` or all, by a trigger on each table of jobs."""
    name = f"refuse_{task}"
    final = ", ".join(f"'{state}'" for state in states or ("completed", "failed"))
    tables = database.execute(
        "select relname from pg_class join pg_attribute on attrelid = pg_class.oid"
        " where relkind = 'r' and relname like 'viralfx%jobs' and attname = 'state'"
    )
    database.execute(
        f"create function {name}() returns trigger language plpgsql as $$ begin"
        f" if new.task = 'culprits.{task}' and new.state in ({final}) then"
        " raise exception 'planted: no'; end if; return new; end $$"
    )
    for (table,) in tables:
        database.execute(
            f"create trigger {name} before insert or update on {table}"
            f" for each row execute function {name}()"
        )
    try:
        yield
    finally:
        database.execute(f"drop function {name} cascade")
