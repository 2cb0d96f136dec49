"""The jobs API: accept, look up, list, retry, cancel and follow jobs over HTTP."""

from viralfx.web.jobs.routes import JOBS, JobsApi, jobs_router

__all__ = ["JOBS", "JobsApi", "jobs_router"]
