"""The HTTP side: probe responses, the plugin, and the service's own application."""
