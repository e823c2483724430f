"""transformers: `AutoModel.from_pretrained(artifact)` through its own registry of quantisers, and models from configs.

transformers reads the checkpoint name by name and knows nothing of our bundle. So the quantiser lets it put each blob
where the weight was (the shapes need not agree for weights we claim), tells it to report nothing as missing, and
afterwards fills the model from the artifact, exactly as `pennyweight.load` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..artifact import Artifact, fill, read_artifact
from ..bundle import REST, VERSION
from ..errors import ArtifactError
from ..layers.sites import WeightSite, weight_sites


class PennyweightConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json."""

    def __init__(self, version: int = VERSION, **_: Any) -> None:
        self.quant_method = "pennyweight"  # pyright: ignore[reportAttributeAccessIssue]
        self.version = version


class PennyweightQuantizer(HfQuantizer):
    """Loads artifacts; cannot make them (`pennyweight.shrink` does)."""

    artifact: Artifact
    sites: list[WeightSite]
    tied: dict[str, str]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ArtifactError("transformers cannot shrink a model while loading it: use pennyweight.shrink and save")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.artifact.blobs

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs["checkpoint_files"]
        self.artifact = _for_class(model, read_artifact(Path(files[0]).parent))
        self.sites = weight_sites(model)
        # Transformers would tie blobs as if they were weights, and pad biases to their length.
        self.tied, model.all_tied_weights_keys = model.all_tied_weights_keys, {}
        model._keys_to_ignore_on_load_missing = {".*"}
        model._keys_to_ignore_on_load_unexpected = {f"^{REST}$".replace(".", r"\.")}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            delattr(model, name)  # back to the class's own
        for site in self.sites:
            _blank_parameter(site)
        for name, source in self.tied.items():
            module, _, attribute = name.rpartition(".")
            model.get_submodule(module)._parameters[attribute] = model.get_parameter(source)
        fill(model, self.artifact)

    def is_serializable(self) -> bool:
        return False  # save_pretrained would write what nobody can read; pennyweight.save writes artifacts

    @property
    def is_trainable(self) -> bool:
        return False


def _for_class(model: Any, artifact: Artifact) -> Artifact:
    """The artifact as this class names its weights: a base model may be taken from a model with a head.

    Raises ArtifactError if the artifact holds weights that the class lacks.
    """
    state = model.state_dict().keys()
    prefix = f"{model.base_model_prefix}."
    if model.base_model_prefix and not any(name.startswith(prefix) for name in state):
        artifact = artifact.below(prefix)
    for name in artifact.blobs:
        if name not in state:
            raise ArtifactError(
                f"the artifact holds {name}, which {type(model).__name__} lacks: load it with the class named in its "
                "config.json, or with pennyweight.load"
            )
    return artifact


def _blank_parameter(site: WeightSite) -> None:
    """Where transformers has put a blob, put a parameter of the site's shape back, without values or memory."""
    loaded = site.module._parameters[site.attribute]
    if loaded is not None and loaded.dtype == torch.uint8:
        like = torch.empty(1, dtype=site.parameter.dtype, device=loaded.device)
        site.module._parameters[site.attribute] = nn.Parameter(like.expand(site.parameter.shape), requires_grad=False)


def register() -> None:
    """Enter the quantiser and its configuration in transformers' registries, once. Importing this module does it."""
    if "pennyweight" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("pennyweight")(PennyweightConfig)
        register_quantizer("pennyweight")(PennyweightQuantizer)


def empty_model(config: Mapping[str, Any], directory: Path) -> nn.Module:
    """The transformers model that a config.json describes, its weights not yet meaning anything.

    Raises ArtifactError if the configuration names no architecture of the installed transformers.
    """
    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    architecture = (settings.get("architectures") or [None])[0]
    if architecture is None or "model_type" not in settings:
        raise ArtifactError(
            f"{directory} names no transformers model; pass model=, the class or function that makes the model"
        )
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ArtifactError(
            f"{directory} needs {architecture}, which transformers {transformers.__version__} lacks: "
            "upgrade it, or pass model="
        )
    made = transformers.AutoConfig.for_model(**settings)
    dtype = getattr(torch, str(settings.get("dtype", "float32")).removeprefix("torch."))
    with torch.random.fork_rng(devices=[]):  # its random weights are of no interest, the caller's generator is
        return model_class(made).to(dtype)


register()
