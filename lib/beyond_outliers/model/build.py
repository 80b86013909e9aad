"""A run's model from its configuration."""

from collections.abc import Callable
from typing import cast

import torch

from beyond_outliers.config.run import LlamaConfig, ModelConfig, Olmo2Config, RunConfig
from beyond_outliers.model.decoder import Decoder
from beyond_outliers.model.llama import Llama
from beyond_outliers.model.olmo2 import Olmo2
from beyond_outliers.passes import plain_settings
from beyond_outliers.quantizers.convert import prepare_qat
from beyond_outliers.quantizers.spec import QuantSpec

MODELS: dict[type[ModelConfig], Callable[..., Decoder]] = {Olmo2Config: Olmo2, LlamaConfig: Llama}


def build_model(config: RunConfig) -> Decoder:
    """The run's model at its initialisation: a function of (shape, seed), the same for every optimizer."""
    with torch.random.fork_rng(devices=[]), plain_settings(training=True):
        torch.manual_seed(config.seed)
        model = MODELS[type(config.model)](config.model)
        if config.quantization:
            spec = {key: value for key, value in config.quantization.items() if key != "scheme"}
            model = cast(Decoder, prepare_qat(model, QuantSpec(**spec), scheme=config.quantization["scheme"]))
    return model
