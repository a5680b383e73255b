"""What PEFT's settings say of a LoRA's scale.

They are in `adapter_config.json` beside a file that PEFT wrote, or in the metadata of one that diffusers wrote,
`lora_adapter_metadata`, for each component (https://huggingface.co/docs/peft/package_reference/lora).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rt.errors import CheckpointError
from rt.export.facts import FOLDERS
from rt.json_file import parse_json
from rt.model import Component

METADATA = "lora_adapter_metadata"
_DEFAULT_ALPHA = 8  # of PEFT's LoraConfig

# What makes another formula of it, or changes the weights beneath.
_CHANGES = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica", "orthogonal")
"""Ways to begin that leave the model with other weights than the published ones."""


@dataclass(frozen=True)
class Settings:
    """Those of one network.

    Attributes:
        alpha: α where no pattern says otherwise.
        patterns: Regular expressions of the end of a module's name, the first that fits, to its α.
        rank_stabilized: Whether the scale is α / √r instead of α / r (https://arxiv.org/abs/2312.03732).
    """

    alpha: float
    patterns: Mapping[str, float]
    rank_stabilized: bool

    def scale(self, module: str, rank: int) -> float:
        """Of the product for `module`, a name with its dots, as PEFT's `get_pattern_key` looks it up."""
        fits = (alpha for key, alpha in self.patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        return next(fits, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str, what: str) -> Settings:
        """From a `LoraConfig` of PEFT, which is `what` `where` has.

        Raises:
            CheckpointError: It is of another kind, or damaged.
        """
        if (kind := data.get("peft_type", "LORA")) != "LORA":
            raise CheckpointError(f"{where} has a {kind} in its {what}, and rt merges plain LoRAs alone")
        if changes := [key for key in _CHANGES if data.get(key)]:
            raise CheckpointError(f"{where} has {changes[0]} in its {what}, and rt merges plain LoRAs alone")
        begun = data.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASE):
            raise CheckpointError(
                f"{where} began as {begun} by its {what}, which changes the model's own weights: convert it with "
                "PEFT's path_initial_model_for_weight_conversion"
            )
        try:
            alpha = float(data.get("lora_alpha", _DEFAULT_ALPHA))
            patterns = {str(key): float(own) for key, own in (data.get("alpha_pattern") or {}).items()}
            if not all(map(math.isfinite, (alpha, *patterns.values()))):
                raise ValueError("α is not finite")
            for key in patterns:
                re.compile(key)
        except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
            raise CheckpointError(f"{where} has bad {what} ({error}): download it again") from None
        if nested := [key for key in patterns if re.search(r"\)[*+{]", key)]:
            # Matching it may take for ever.
            raise CheckpointError(f"{where} has {nested[0]!r} in its {what}, a group that repeats: refused")
        return cls(alpha, patterns, bool(data.get("use_rslora")))


def from_metadata(metadata: Mapping[str, str], where: str) -> dict[Component, Settings]:
    """Of each component of which the metadata of a file say them.

    Raises:
        CheckpointError: They are damaged, or of another kind of LoRA.
    """
    try:
        said: dict[str, Any] = dict(parse_json(metadata.get(METADATA, "{}").encode()))
    except (ValueError, TypeError):
        raise CheckpointError(f"{where} has bad {METADATA}: download it again") from None
    found = {}
    for component, folder in FOLDERS.items():
        own = {
            key.removeprefix(f"{folder}."): value
            for key, value in said.items()
            if key.startswith(f"{folder}.")
        }
        if own:
            found[component] = Settings.from_json(own, where, METADATA)
    return found
