"""Programs of others, unmodified, against this project's server."""
