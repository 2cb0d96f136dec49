"""The HTTP server: connections, limits, and responses of any ASGI application."""
