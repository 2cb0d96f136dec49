"""A task that reports its progress and can be cancelled: TASK_MODULES=docs.examples.imports."""

import asyncio

from viralfx import JobContext, task


@task("rows.import", timeout=3600.0)
async def import_rows(rows: list[str], context: JobContext) -> int:
    for number, row in enumerate(rows):
        context.report(current=number, total=len(rows), message=row)
        await asyncio.sleep(0.1)  # the work
    return len(rows)
