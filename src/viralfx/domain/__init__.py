"""The domain of operations: health, stop, fleet, audit, access and webhooks, and their ports.

Nothing but the standard library.
"""
