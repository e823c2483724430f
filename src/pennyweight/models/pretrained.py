"""transformers models and tokenizers from a local directory; safetensors only, nothing fetched."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .. import artifact
from ..checkpoints import refuse_pickle
from ..errors import ArtifactError, require

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


def load_pretrained(directory: str | Path, class_name: str | None = None) -> nn.Module:
    """The model of a directory with config.json and safetensors, float32, in eval mode; packed if its files are.

    class_name: a class of transformers; the default is the architecture that config.json names. Raises ArtifactError
    if there are only pickles, a file is damaged, or transformers lacks the class.
    """
    path = Path(directory)
    config = _read_config(path)
    if artifact.is_artifact(path):
        return artifact.load(path)
    if not any(path.glob("*.safetensors")):
        for file in sorted(path.iterdir()):
            refuse_pickle(file)
        raise ArtifactError(f"{path} holds no safetensors; save the model with save_pretrained")
    transformers = require("transformers", "hf")
    name = class_name or (config.get("architectures") or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ArtifactError(
            f"{path} needs {name}, which transformers {transformers.__version__} lacks: upgrade it, or give "
            "a module:factory"
        )
    try:
        with quiet_transformers():
            model = model_class.from_pretrained(path, dtype="float32", use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{path} cannot be loaded as {name}: {_first_line(error)}") from error
    return model.eval()


def has_tokenizer(directory: str | Path) -> bool:
    return any((Path(directory) / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a directory. Raises ArtifactError if it has none or it is damaged."""
    transformers = require("transformers", "hf")
    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ArtifactError(f"{directory} has no tokenizer that loads: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # such as GPT-2's; masked, so which one does not matter
    return tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and load reports, which would run through ours."""
    logging = require("transformers", "hf").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read_config(path: Path) -> dict[str, Any]:
    file = path / artifact.CONFIG
    if not file.is_file():
        raise ArtifactError(
            f"{path} has no config.json; give a directory that save_pretrained wrote, or a module:factory"
        )
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); get the file again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{file} is damaged: it is not a JSON object; get the file again")
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
