"""What sequences share, and which of it becomes a level."""
