"""The configuration of a process: what can be set, and how it is read."""

from viralfx.settings.environment import Field, fields, read_settings, show, source
from viralfx.settings.model import Secret, Settings

__all__ = ["Field", "Secret", "Settings", "fields", "read_settings", "show", "source"]
