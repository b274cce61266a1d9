"""One rank: runs step plans on one device."""
