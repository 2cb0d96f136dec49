"""Webhooks: allowed destinations, signatures, delivery with retries, and health alerts."""
