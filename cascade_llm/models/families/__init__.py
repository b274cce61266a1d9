"""One file for each family of architectures: how a layer is composed, and which fields of config.json it reads."""
