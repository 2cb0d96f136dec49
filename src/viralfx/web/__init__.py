"""The HTTP side: probe answers, the plugin, and the service's own application."""
