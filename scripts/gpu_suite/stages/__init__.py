"""The stages, a module each with `run(stage)`; `scripts.gpu_suite.table` says in which order they come."""
