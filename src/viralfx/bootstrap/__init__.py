"""The composition root: settings in, wired services out; the only package that names adapters."""

from viralfx.bootstrap.assembly import Assembly, assemble

__all__ = ["Assembly", "assemble"]
