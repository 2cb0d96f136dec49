"""The domain: health, shutdown, resilience, jobs and webhooks. It imports the standard library and cronsim."""
