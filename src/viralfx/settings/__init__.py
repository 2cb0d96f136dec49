"""The configuration of a process: what can be set, and how it is read."""

from viralfx.settings.backends import DatabaseSettings, RedisSettings
from viralfx.settings.database_url import DatabaseAddress
from viralfx.settings.environment import given, read_settings, source
from viralfx.settings.fields import Field, fields, show
from viralfx.settings.jobs import JobSettings, WebhookSettings
from viralfx.settings.kinds import Secret
from viralfx.settings.model import Settings

__all__ = [
    "DatabaseAddress",
    "DatabaseSettings",
    "Field",
    "JobSettings",
    "RedisSettings",
    "Secret",
    "Settings",
    "WebhookSettings",
    "fields",
    "given",
    "read_settings",
    "show",
    "source",
]
