"""The HTTP front: tokenising, admission, placement, and the life of each request."""
