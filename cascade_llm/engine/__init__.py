"""Plan, execute, commit, emit."""
