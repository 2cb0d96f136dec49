-- Drops the limits of tasks.

DROP FUNCTION
    viralfx_ops.viralfx_claim_jobs, viralfx_ops.viralfx_choose_by_key, viralfx_ops.viralfx_rate_left;
DROP TABLE viralfx_ops.viralfx_task_limits;
DROP INDEX
    viralfx_ops.viralfx_jobs_waiting, viralfx_ops.viralfx_jobs_waiting_tasks,
    viralfx_ops.viralfx_jobs_waiting_keys, viralfx_ops.viralfx_jobs_active,
    viralfx_ops.viralfx_jobs_cancelled;
