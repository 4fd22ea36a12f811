"""Loading for the command line: a checkpoint on this disk, or a model of real dimensions with random weights. Each rank
calls it; without a mode the model runs by transformers' own TP plan.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.integrations.transformers.integration import Applied, disable, enable
from tpfuse.presets import ModelPreset


def from_folder(folder: Path, mode: str | None, world: int, dtype: torch.dtype | None) -> Any:
    """The model of a checkpoint folder: safetensors only, no code from the folder, nothing from the network."""
    transformers = _transformers()
    if not any(folder.glob("*.safetensors")):
        raise InvalidArgument(f"{folder}: no *.safetensors here; needed: a folder with config.json and safetensors.")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    settings = {"use_safetensors": True, "local_files_only": True, "dtype": dtype or config.dtype}
    return _load(_class_of(config), str(folder), mode, world, config=config, **settings)


def config_of(preset: ModelPreset, layers: int | None = None) -> Any:
    """The configuration of a preset, of its first so many layers."""
    return getattr(_transformers(), preset.config)(**preset.with_layers(layers))


def random(config: Any, mode: str | None, world: int, dtype: torch.dtype) -> Any:
    """A model of this configuration. Each rank makes its own shards of the weights, on its device; what the ranks have
    in common, they have alike."""
    torch.manual_seed(0)
    with warnings.catch_warnings():  # that DTensors of CPUs may differ between ranks: what is common is sent below
        warnings.filterwarnings("ignore", "DTensor random operators", UserWarning)
        model = _load(_class_of(config), None, mode, world, config=config, state_dict={}, dtype=dtype)
    if world > 1:
        divided = model._tpfuse.sharding.parts if isinstance(getattr(model, "_tpfuse", None), Applied) else {}
        for name, parameter in model.named_parameters():
            if name not in divided and not isinstance(parameter, DTensor):
                dist.broadcast(parameter.data, 0)
    return model


def _load(kind: Any, source: str | None, mode: str | None, world: int, **settings: Any) -> Any:
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if mode is not None:
        enable(mode)
    try:
        if world > 1:
            return kind.from_pretrained(
                source, distributed_config=DistributedConfig(tp_size=world, tp_plan="auto"), **settings
            )
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        return kind.from_pretrained(source, device_map=device, **settings)
    finally:
        disable()


def _class_of(config: Any) -> Any:
    """The class of transformers that generates with such a configuration."""
    auto = _transformers().models.auto.modeling_auto
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise Unsupported(f"{type(config).__name__}: transformers has no model of it that generates text.")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise Unsupported(f"transformers can't be imported ({error}). pip install 'tpfuse[transformers]'") from error
    return transformers
