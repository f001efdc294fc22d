"""The HTTP edge: routes, validation, errors, server-sent events."""
