"""Recording the outcomes of claims: each once, by its id and its number."""

from collections.abc import Collection, Sequence

from viralfx.adapters.postgres.job_rows import settled_columns, settlement_columns
from viralfx.adapters.postgres.job_statements import SETTLE, SETTLED_BEFORE
from viralfx.adapters.postgres.job_steps import Turn
from viralfx.domain.jobs.job import Settlement


async def record(turn: Turn, settlements: Sequence[Settlement]) -> Collection[str]:
    """Record what became of claimed jobs; return the ids of those taken now or, unanswered, before.

    Raises ``BAD_CONTENT``, with nothing recorded.
    """
    rows = await turn.connection.fetch(SETTLE, *settlement_columns(settlements))
    taken = {str(row["id"]) for row in rows}
    if turn.again:
        others = [each for each in settlements if each.claim.id not in taken]
        rows = await turn.connection.fetch(SETTLED_BEFORE, *settled_columns(others))
        taken.update(str(row["id"]) for row in rows)
    return taken
