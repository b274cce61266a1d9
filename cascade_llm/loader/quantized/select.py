"""Which format a `quantization_config` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as short_repr
from typing import Any

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.quantized.awq import AWQ
from cascade_llm.loader.quantized.bitsandbytes import METHOD, bits_and_bytes
from cascade_llm.loader.quantized.compressed_tensors import CompressedTensors
from cascade_llm.loader.quantized.format import QuantizedFormat
from cascade_llm.loader.quantized.fp8 import FP8
from cascade_llm.loader.quantized.gptq import GPTQ
from cascade_llm.loader.quantized.modelopt import ModelOpt
from cascade_llm.loader.quantized.mxfp4 import MXFP4

__all__ = ["QUANTIZED_FORMATS", "quantized_format"]

QUANTIZED_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], QuantizedFormat]] = {
    GPTQ.method: GPTQ,
    AWQ.method: AWQ,
    CompressedTensors.method: CompressedTensors,
    FP8.method: FP8,
    MXFP4.method: MXFP4,
    ModelOpt.method: ModelOpt,
    METHOD: bits_and_bytes,
}
"""By `quant_method`."""


def quantized_format(hf_config: Mapping[str, Any]) -> QuantizedFormat | None:
    """None where config.json asks for none.

    Raises:
        UnsupportedModelError: nobody implements it
        CheckpointError: it makes no sense
    """
    config = hf_config.get("quantization_config")
    if config is None or config == {}:
        return None
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json: quantization_config is {short_repr(config)}: it must be an object")
    method = str(config.get("quant_method", "unknown"))
    if method not in QUANTIZED_FORMATS:
        raise UnsupportedModelError(
            f"config.json: quantization_config ({method}) is not implemented; choose a checkpoint in "
            f"{', '.join(QUANTIZED_FORMATS)}, in GGUF, or one that is not quantized"
        )
    return QUANTIZED_FORMATS[method](config)
