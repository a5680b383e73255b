"""What the U-Net of a single file predicts and on which noise levels, by the file and a `.yaml` beside it.

Trainers and merging tools copy metadata and `.yaml` files from models of another kind, so keys among the tensors win.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rt.checkpoint_file import read_bytes
from rt.errors import CheckpointError
from rt.export.architectures import SCHEDULERS
from rt.model import Family

logger = logging.getLogger(__name__)

# As the .yaml of the original code has it, CompVis's or Stability-AI's generative models.
_SAYS_V = re.compile(
    r"""^\s*parameterization:\s*["']?v["']?\s*(?:#.*)?$|^\s*target:.*\.VScaling["']?\s*(?:#.*)?$""",
    re.MULTILINE,
)


def read_scheduler(
    path: Path,
    family: Family,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    prediction_type: str | None,
) -> dict[str, Any]:
    """The scheduler's config of the single file `path`; `prediction_type` is the user's.

    Raises:
        CheckpointError: The file does not say what its U-Net predicts, and its family does not either.
    """
    asked = prediction_type is not None
    prediction_type = prediction_type or _prediction_type(path, family, tensors, metadata)
    if "ztsnr" not in tensors:
        return {**SCHEDULERS[family], "prediction_type": prediction_type}
    if prediction_type == "epsilon":
        logger.warning(
            "%s has the key ztsnr, as models have that predict v, and is taken for one that predicts epsilon%s",
            path.name,
            ", as --prediction-type says" if asked else "; --prediction-type says otherwise",
        )
    # PNDM, of SD 1, knows no such noise levels; DDIM, of SD 2, has the same otherwise.
    usual = SCHEDULERS[Family.SDXL if family is Family.SDXL else Family.SD2]
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**usual, **zero_snr, "prediction_type": prediction_type}


def sidecars(path: Path) -> list[Path]:
    """The `.yaml` beside the file, if there is one."""
    sidecar = path.with_suffix(".yaml")
    return [sidecar] if sidecar.is_file() else []


def _prediction_type(
    path: Path, family: Family, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> str:
    said = list(_sayings(path, tensors, metadata))
    if not said and family is Family.SD2:
        raise CheckpointError(
            f"{path} is a Stable Diffusion 2 and does not say what it predicts: pass --prediction-type "
            "v_prediction (768-pixel models) or epsilon (512-pixel base models)"
        )
    (where, meant), *others = said or [("", "epsilon")]
    for other, contrary in others:
        if contrary != meant:
            logger.warning(
                "%s: %s says %s, and %s %s; %s is taken, --prediction-type says otherwise",
                path.name,
                where,
                meant,
                other,
                contrary,
                meant,
            )
    return meant


def _sayings(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Who says what the U-Net predicts, whom to believe first."""
    if "v_pred" in tensors:
        yield "the key v_pred", "v_prediction"
    for sidecar in sidecars(path):
        text = read_bytes(sidecar).decode("utf-8", errors="replace")
        yield sidecar.name, "v_prediction" if _SAYS_V.search(text) else "epsilon"
    said = metadata.get("modelspec.prediction_type", "").strip().lower()
    if said.startswith(("v", "e")):
        yield "its metadata", "v_prediction" if said.startswith("v") else "epsilon"
