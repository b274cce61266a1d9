"""The server: one process that speaks HTTP, and one with the engine."""
