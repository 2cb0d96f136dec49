"""Retries, circuit breakers, deadlines, bulkheads and fallbacks for any asynchronous call."""
