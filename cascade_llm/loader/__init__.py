"""From a model's name to its configuration and weights."""
