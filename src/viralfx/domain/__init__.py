"""The domain: health, shutdown, resilience, jobs and webhooks. Standard library only."""
