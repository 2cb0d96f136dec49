-- Drops all jobs.

DROP FUNCTION viralfx_ops.viralfx_accept_jobs;
DROP VIEW viralfx_ops.viralfx_all_jobs;
DROP TABLE
    viralfx_ops.viralfx_jobs, viralfx_ops.viralfx_finished_jobs, viralfx_ops.viralfx_workers,
    viralfx_ops.viralfx_job_counters, viralfx_ops.viralfx_unknown_tasks;
DROP FUNCTION
    viralfx_ops.viralfx_count_inserted_jobs, viralfx_ops.viralfx_count_updated_jobs,
    viralfx_ops.viralfx_count_deleted_jobs, viralfx_ops.viralfx_count_truncated_jobs;
