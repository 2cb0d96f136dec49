"""Calls that may fail: tried again, cut, limited, refused, or answered otherwise."""
