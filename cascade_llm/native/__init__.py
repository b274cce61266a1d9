"""C that the machine's own compiler builds when an engine starts."""
