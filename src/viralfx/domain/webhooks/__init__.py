"""Webhooks: where one may be sent, how it is signed, and what a receiver's answer means."""
