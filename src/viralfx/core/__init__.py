"""What every part shares: errors, events, clock, loops, threads, ids and correlation.

Nothing but the standard library.
"""
