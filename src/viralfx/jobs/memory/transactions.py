"""Jobs that are submitted in a transaction, and wait in memory until it commits.

The transaction is that of a task, or one of a database: of SQLAlchemy with any driver, or of
asyncpg. Neither package is imported before one of its objects is given.
"""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet, ref

from viralfx.core.errors import TransactionError
from viralfx.core.loops import ForeignLoopError, HomeLoop, blocking, running_loop
from viralfx.jobs.model import Job, JobDraft

T = TypeVar("T")

_POLL_SECONDS = 0.005
"""Between two looks at a commit that has begun."""
_TURNS = 10
"""Turns of the event loop in which asyncpg reports the end of a transaction; it needs one."""


class MemoryTransaction:
    """The jobs that a transaction accepts; the ledger stores them if it commits.

    It is also the ``context.connection`` of a transactional task, whose methods it does not have.
    """

    def __init__(self) -> None:
        self.accepted: list[tuple[JobDraft, Job]] = []
        self.after_commit: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:
        """Say why there is no such method."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise TransactionError(
            "transactional=True needs DATABASE_URL: the jobs are in memory, so context.connection"
            f" has no {name!r}"
        )

    def find(self, draft: JobDraft) -> Job | None:
        """Return the job that this transaction accepted for the key of a draft, or a duplicate."""
        if draft.key is None and draft.unique_key is None:
            return None
        for other, job in self.accepted:
            if (draft.key is not None and draft.key == other.key) or (
                draft.unique_key is not None and draft.unique_key == other.unique_key
            ):
                return job
        return None


async def _called(call: Callable[[], T]) -> T:
    return call()


class ForeignTransactions:
    """The open transactions of databases in which jobs were submitted."""

    def __init__(self, home: HomeLoop, store: Callable[[MemoryTransaction], None]) -> None:
        """``store`` stores the jobs of a transaction that has committed; it runs on ``home``."""
        self._home = home
        self._store = store
        self._sqlalchemy: WeakKeyDictionary[Any, _Watch] = WeakKeyDictionary()
        self.of_asyncpg: WeakKeyDictionary[Any, _AsyncpgWatch] = WeakKeyDictionary()
        """Those of asyncpg whose end was not reported."""
        self._engines: WeakSet[Any] = WeakSet()
        self.ending: list[_ConnectionWatch] = []
        """Those of SQLAlchemy whose commit has begun, and whose outcome is not known."""
        self._polling = False
        self._lent: dict[int, MemoryTransaction] = {}

    @contextmanager
    def lend(self, connection: object, transaction: MemoryTransaction) -> Iterator[None]:
        """Let a connection stand for a transaction of the ledger's own within the block."""
        self._lent[id(connection)] = transaction
        try:
            yield
        finally:
            del self._lent[id(connection)]

    async def at_home(self, call: Callable[[], T]) -> T:
        """Return the result of ``call``, which runs on the home loop, if there is one."""
        loop, here = self._home.running, running_loop()
        if loop is None or loop is here:
            return call()
        if here is None:
            return blocking(loop, partial(_called, call))
        return await self._home.run(partial(_called, call))

    async def find(self, given: Any, *, blocks: bool = False) -> MemoryTransaction:
        """Return the jobs of the open transaction of a connection or session.

        With ``blocks`` the call has no event loop, and never waits. Raises
        :class:`TransactionError` for one that is in no transaction and begins none by itself, and
        for any other object.
        """
        if isinstance(given, MemoryTransaction):
            return given
        if (lent := self._lent.get(id(given))) is not None:
            return lent
        self.resolve()
        packages = {kind.__module__.partition(".")[0] for kind in type(given).__mro__}
        is_asynchronous = any(
            kind.__module__.startswith("sqlalchemy.ext.asyncio.") for kind in type(given).__mro__
        )
        if blocks and (is_asynchronous or "asyncpg" in packages):
            raise TransactionError(
                "connection= of a synchronous call takes a session or connection of SQLAlchemy that"
                f" is synchronous, not {type(given).__module__}.{type(given).__qualname__}; use"
                " `await jobs.submit(..., connection=...)` for it"
            )
        if "asyncpg" in packages and hasattr(given, "add_query_logger"):
            return await self._find_asyncpg(given)
        if "sqlalchemy" in packages:
            return await self._find_sqlalchemy(given)
        raise TransactionError(
            "the jobs are in memory, where connection= takes a session or connection of SQLAlchemy,"
            f" or a connection of asyncpg, not {type(given).__module__}.{type(given).__qualname__};"
            " set DATABASE_URL, or submit the job after the commit"
        )

    def store(self, transaction: MemoryTransaction) -> None:
        """Store the jobs of a transaction that has committed, from any thread.

        A thread without an event loop waits until they are stored.
        """
        loop, store = self._home.running, partial(self._store, transaction)
        if not transaction.accepted:
            return
        if loop is None or running_loop() is not None:
            self._home.call_soon(store)
            return
        with suppress(ForeignLoopError):  # the loop ends, and the ledger with it
            blocking(loop, partial(_called, store))

    def commit_begins(self, watch: "_ConnectionWatch") -> None:
        """Store the jobs of a connection of SQLAlchemy as soon as its commit has succeeded."""
        self.ending.append(watch)
        loop = self._home.running
        with suppress(RuntimeError):  # the loop has just been closed
            if loop is not None:
                loop.call_soon_threadsafe(self._poll)

    async def settle(self) -> None:
        """Wait until the outcome of each transaction that has ended is known."""
        for _ in range(_TURNS):
            if not self.resolve():
                return
            await asyncio.sleep(0)

    def resolve(self) -> bool:
        """Store the jobs of transactions that have committed.

        Returns True if asyncpg has not reported yet how a transaction ended.
        """
        for watch in tuple(self.ending):
            if (committed := watch.outcome()) is None:
                continue
            with suppress(ValueError):  # another thread is faster
                self.ending.remove(watch)
                watch.end(committed=committed)
        return any(watch.is_late() for watch in tuple(self.of_asyncpg.values()))

    def _poll(self, *, again: bool = False) -> None:
        self._polling = self._polling and not again
        self.resolve()
        loop = self._home.running
        if self.ending and loop is not None and not self._polling:
            self._polling = True
            loop.call_later(_POLL_SECONDS, partial(self._poll, again=True))

    # -- SQLAlchemy --------------------------------------------------------------------------

    async def _find_sqlalchemy(self, given: Any) -> MemoryTransaction:
        # Loaded already, since this is one of its objects.
        from sqlalchemy import Connection, event  # noqa: PLC0415
        from sqlalchemy.orm import Session  # noqa: PLC0415

        if callable(given) and hasattr(given, "registry"):
            given = given()  # a scoped session, which stands for the session of this task
        inner = getattr(given, "sync_session", None) or getattr(given, "sync_connection", None)
        target = inner or given
        if not isinstance(target, Session | Connection):
            raise TransactionError(
                "connection= takes an open session or connection of SQLAlchemy, not"
                f" {type(given).__qualname__}"
            )
        if _commits_each_statement(target):
            raise TransactionError(
                "the isolation level of the connection is AUTOCOMMIT, so the job would be accepted"
                " at once; use another one"
            )
        if not target.in_transaction():
            if isinstance(target, Connection) and inner is not None:
                from sqlalchemy.util import greenlet_spawn  # noqa: PLC0415 - as above

                await greenlet_spawn(target.begin)  # events of the application may use it
            else:
                target.begin()
        watch = self._sqlalchemy.get(target)
        if watch is None:
            listen = partial(event.listen, target)
            if isinstance(target, Session):
                watch = _SessionWatch(self, listen)
            else:
                watch = _ConnectionWatch(self, listen)
                if target.engine not in self._engines:
                    self._engines.add(target.engine)
                    event.listen(target.engine, "handle_error", self._failed)
            self._sqlalchemy[target] = watch
        return watch.transaction

    def _failed(self, context: Any) -> None:
        watch = self._sqlalchemy.get(context.connection) if context.connection is not None else None
        if isinstance(watch, _ConnectionWatch):
            watch.failed()

    # -- asyncpg -----------------------------------------------------------------------------

    async def _find_asyncpg(self, given: Any) -> MemoryTransaction:
        if not given.is_in_transaction():
            raise TransactionError(
                "the connection is in no transaction, so the job would be accepted at once; submit"
                " it inside `async with connection.transaction():`"
            )
        # A pool lends a proxy, which loses the connection at its release.
        connection = getattr(given, "_con", None) or given
        if connection in self.of_asyncpg:
            await asyncio.sleep(0)  # for the reports of statements before this call
        if (watch := self.of_asyncpg.get(connection)) is None:
            watch = self.of_asyncpg[connection] = _AsyncpgWatch(self, connection)
        return watch.transaction

    def forget(self, connection: object) -> None:
        """End the watch of a connection of asyncpg, whose transaction has ended."""
        self.of_asyncpg.pop(connection, None)


def _commits_each_statement(target: Any) -> bool:
    bind = target
    if hasattr(target, "get_bind"):
        try:
            bind = target.get_bind()
        except Exception:  # noqa: BLE001 - a session with a database for each of its tables
            return False
    of_dialect = getattr(bind.dialect, "_on_connect_isolation_level", None)
    level: object = bind.get_execution_options().get("isolation_level", of_dialect)
    return level == "AUTOCOMMIT"


class _Watch:
    """The jobs of the open transaction of one session or connection, and of its savepoints.

    A savepoint that began before the first job is not known, so that its end leaves no job.
    """

    def __init__(self, owner: ForeignTransactions) -> None:
        self._owner = owner
        self.transaction = MemoryTransaction()

    def _roll_back(self, to: int = 0) -> None:
        del self.transaction.accepted[to:]
        if not to:
            self.transaction.after_commit.clear()

    def _take(self) -> MemoryTransaction:
        """Return the jobs, and begin the next transaction."""
        transaction, self.transaction = self.transaction, MemoryTransaction()
        return transaction


class _SessionWatch(_Watch):
    """That of a session of SQLAlchemy, whose event comes after the commit."""

    def __init__(
        self, owner: ForeignTransactions, listen: Callable[[str, Callable[..., None]], object]
    ) -> None:
        super().__init__(owner)
        # The transactions refer to the session, which may be dropped without an end of them.
        self._marks: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        listen("after_transaction_create", self._began)
        listen("after_soft_rollback", self._rolled_back)
        listen("after_transaction_end", self._ended)
        listen("after_commit", self._committed)

    def _began(self, _session: Any, transaction: Any) -> None:
        self._marks[transaction] = len(self.transaction.accepted)

    def _rolled_back(self, _session: Any, transaction: Any) -> None:
        self._roll_back(self._marks.get(transaction, 0))

    def _ended(self, _session: Any, transaction: Any) -> None:
        if transaction.parent is None:
            self._roll_back()
            self._marks.clear()

    def _committed(self, session: Any) -> None:
        if not session.in_nested_transaction():  # the end of a savepoint is no commit
            self._owner.store(self._take())


class _ConnectionWatch(_Watch):
    """That of a connection of SQLAlchemy, whose event comes before the commit."""

    def __init__(
        self, owner: ForeignTransactions, listen: Callable[[str, Callable[..., None]], object]
    ) -> None:
        super().__init__(owner)
        self._marks: list[int] = []
        self._ending: tuple[Any, Any, MemoryTransaction] | None = None
        """The connection, its transaction that commits, and the jobs of that."""
        self._has_failed = False
        listen("savepoint", self._began)
        listen("release_savepoint", self._released)
        listen("rollback_savepoint", lambda *_: self._roll_back(self._mark()))
        listen("rollback", self._rolled_back)
        listen("rollback_twophase", self._rolled_back)
        listen("commit", self._committing)
        listen("commit_twophase", self._committing)

    def _began(self, *_: object) -> None:
        self._marks.append(len(self.transaction.accepted))

    def _released(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> int:
        return self._marks.pop() if self._marks else 0

    def _rolled_back(self, *_: object) -> None:
        self._roll_back()
        self._marks.clear()

    def _committing(self, connection: Any, *_: object) -> None:
        self._marks.clear()
        if self.transaction.accepted:
            self._has_failed = False
            self._ending = connection, connection.get_transaction(), self._take()
            self._owner.commit_begins(self)

    def failed(self) -> None:
        """Note an error of the connection; one during the commit means that it failed."""
        self._has_failed = self._has_failed or self.outcome() is None

    def outcome(self) -> bool | None:
        """Return whether the commit succeeded; None while it goes on."""
        if self._ending is None or self._has_failed:
            return False
        connection, transaction, _ = self._ending
        if connection.get_transaction() is not transaction:
            return True
        return None if transaction.is_active else False

    def end(self, *, committed: bool) -> None:
        """Store the jobs, or drop them."""
        ending, self._ending = self._ending, None
        if committed and ending is not None:
            self._owner.store(ending[-1])


_SAVEPOINT = re.compile(
    r"\s*(?:(?P<begin>savepoint)|(?P<release>release)(?:\s+savepoint)?"
    r"|rollback(?:\s+(?:work|transaction))?\s+to(?:\s+savepoint)?)\s+(?P<name>\"[^\"]+\"|\w+)",
    re.IGNORECASE,
).match
_ENDS = re.compile(r"(?:^|;)\s*(commit|end|rollback|abort)\b", re.IGNORECASE).findall


class _AsyncpgWatch(_Watch):
    """That of a connection of asyncpg, which reports each statement in the next turn of its loop.

    It does not report statements of cursors and COPY. If one of them fails, the application
    catches the error and commits, the server rolls back, which is not seen here.
    """

    def __init__(self, owner: ForeignTransactions, connection: Any) -> None:
        super().__init__(owner)
        self._connection = ref(connection)
        self._marks: dict[str, int] = {}
        self._has_failed = False
        connection.add_query_logger(self._on_statement)

    def is_late(self) -> bool:
        """Return whether the transaction has ended, and nothing was reported of it."""
        connection = self._connection()
        if connection is None or connection.is_closed():
            return False
        return not connection.is_in_transaction()

    def _on_statement(self, query: Any) -> None:
        connection, error, text = self._connection(), query.exception, query.query
        if connection is None:
            return
        if not connection.is_in_transaction():
            ends = _ENDS(text)
            committed = bool(ends) and ends[-1].lower() in {"commit", "end"} and error is None
            connection.remove_query_logger(self._on_statement)
            self._owner.forget(connection)
            if committed and not self._has_failed:
                self._owner.store(self._take())
        elif error is not None:
            # The server fails the transaction, and the driver cancels a statement that is too late.
            of_server = getattr(error, "severity", None) is not None
            late = isinstance(error, TimeoutError | asyncio.CancelledError)
            self._has_failed = self._has_failed or of_server or late
        elif (found := _SAVEPOINT(text)) is not None:
            self._on_savepoint(found)

    def _on_savepoint(self, found: "re.Match[str]") -> None:
        name = found["name"]
        if found["begin"]:
            self._marks[name] = len(self.transaction.accepted)
        elif found["release"]:
            self._marks.pop(name, None)
        else:
            self._roll_back(self._marks.get(name, 0))
            self._has_failed = False
