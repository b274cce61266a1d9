"""Planted faults: rules of the device, of FlashInfer and of sampling, each broken in the engine on purpose."""
