"""What developers and CI run; no part of the installed package."""
