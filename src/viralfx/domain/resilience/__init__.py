"""Resilience: retry, circuit breaker, deadline, bulkhead and fallback."""
