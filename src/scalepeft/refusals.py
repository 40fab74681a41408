"""What upstream refuses, as one line that names the recipe's key."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from scalepeft.errors import UserError, one_line
from scalepeft.recipe import Recipe

_RAISES = (
    *(OSError, ValueError, ImportError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError, re.error),
    StrictDataclassError,  # a config.json with figures that no model can have
)


@contextlib.contextmanager
def upstream_errors(recipe: Recipe, key: str) -> Iterator[None]:
    """What upstream says of a wrong name, an unreachable Hub or a wrong option, as an error of the recipe."""
    try:
        yield
    except UserError:
        raise
    except _RAISES as error:
        raise recipe.error(*_explained(recipe, key, error)) from error


def _explained(recipe: Recipe, key: str, error: Exception) -> tuple[str, str]:
    """The key that an error is about, and what is wrong with it."""
    text = one_line(error)
    adapter = recipe.adapter or {}
    name = recipe.model.name_or_path if key.startswith("model") else adapter.get("name_or_path", "")
    if "couldn't connect" in text or "offline mode" in text.lower() or "outgoing traffic has been disabled" in text:
        told = f"{name!r} is not in the cache ({HF_HUB_CACHE}) and the Hub cannot be reached; fetch it where there is a network"
        return key, told
    if "is not a local folder and is not a valid model identifier" in text or text.startswith("Repo id must"):
        return key, f"{name!r} is neither a folder here nor an id of the Hub that this token may read"
    if "trust_remote_code" in text and "custom code" in text:
        return key, f"{name!r} brings code of its own; read it, and model.trust_remote_code: true lets it run"
    if ("Target modules" in text and "not found" in text) or "No modules were targeted" in text:
        return key, f"target_modules {adapter.get('target_modules')!r} match no module of {recipe.model.name_or_path}"
    if key == "model.name_or_path" and re.search("flash.?attention|attn_implementation", text, re.IGNORECASE):
        key = "model.attn_implementation"
    return key, text if len(text) < 300 else f"{text[:300]}..."
