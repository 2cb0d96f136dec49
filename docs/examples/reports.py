"""A scheduled task: TASK_MODULES=docs.examples.reports."""

from viralfx import JobContext, task


@task("reports.daily", cron="30 2 * * *", timezone="Europe/Berlin", catch_up=True)
async def daily_report(_: None, context: JobContext) -> str:
    return f"The report of job {context.id}"
