"""The domain: health, shutdown, resilience, jobs, webhooks.

It imports the standard library, and cronsim, which only calculates.
"""
