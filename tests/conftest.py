"""Makes the fixtures with real servers known to all tests."""

pytest_plugins = ["tests.servers.fixtures", "tests.integration.databases"]
