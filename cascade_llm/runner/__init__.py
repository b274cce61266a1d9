"""One process, one device: runs step plans."""
