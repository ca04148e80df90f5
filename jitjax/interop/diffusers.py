"""The Diffusers form of a JiT: a folder with transformer/config.json and transformer/diffusion_pytorch_model.safetensors.

Written as the class JiTTransformer2DModel of huggingface/diffusers pull request 13098 loads it (as of June 2026; no release
has it): q, k and v are separate, the final layer's three parts stand at the top, no name has a prefix. Its network and time
are the official ones (t from 0, noise, to 1, data; the clean image is predicted), so only names differ. The hub folder
BiliSakura/JiT-diffusers follows an earlier state of that class, with q, k and v joined; `jitjax.interop.names` reads both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jitjax.errors import UserError
from jitjax.geometry import SIZES, Geometry
from jitjax.interop import official
from jitjax.model import CHANNELS

NORM_EPS = 1e-6  # ours is fixed, as the official code's is
# config.json of the class (left) and our geometry. Older folders give a preset by name and num_class_embeds.
FIELDS = {
    "sample_size": "image_size", "patch_size": "patch_size", "hidden_size": "width", "num_layers": "depth",
    "num_attention_heads": "heads", "mlp_ratio": "mlp_ratio", "attention_dropout": "attn_dropout", "dropout": "proj_dropout",
    "num_classes": "num_classes", "bottleneck_dim": "bottleneck", "in_context_len": "context_length",
    "in_context_start": "context_start",
}  # fmt: skip
DIFFUSERS_VERSION = "0.39.0"


def describe(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a config.json beside the weights says: {"geometry": {field: value}, "prediction": ..., ...}, or nothing.

    Raises:
      UserError: it describes a network that ours is not.
    """
    if config.get("format") == "jitjax":
        return {"geometry": config["geometry"]} if isinstance(config.get("geometry"), dict) else {}
    if not {"in_context_start", "model_type", "bottleneck_dim", "num_class_embeds"} & set(config):
        return {}
    preset = re.fullmatch(r"JiT-([A-Z])/(\d+)", str(config.get("model_type") or config.get("model_name") or ""))
    geometry: dict[str, Any] = {}
    if preset and preset[1] in SIZES:
        geometry = {**SIZES[preset[1]], "patch_size": int(preset[2])}
    geometry |= {ours: config[theirs] for theirs, ours in FIELDS.items() if _is_number(config.get(theirs))}
    if "num_classes" not in geometry and _is_number(config.get("num_class_embeds")):
        geometry["num_classes"] = config["num_class_embeds"]
    for key, allowed in (("norm_eps", NORM_EPS), ("in_channels", CHANNELS)):
        if config.get(key, allowed) != allowed:
            raise UserError(f"{path}: {key}={config[key]}: a JiT here has {allowed}")
    return {"geometry": geometry, "prediction": "x"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_state_dict(params: Mapping[str, Any], geometry: Geometry) -> dict[str, np.ndarray]:
    """Our flat parameters under the names of the class."""
    result = {}
    for name, value in official.to_state_dict(params, geometry, prefix="").items():
        name = re.sub(r"^final_layer\.norm_final\.", "norm_final.", name)
        name = re.sub(r"^final_layer\.linear\.", "linear_final.", name)
        name = re.sub(r"^final_layer\.adaLN_modulation\.1\.", "adaLN_modulation_final.", name)
        name = name.replace(".adaLN_modulation.1.", ".adaLN_modulation.")
        name = re.sub(r"\.attn\.([qk])_norm\.", r".attn.norm_\1.", name).replace(".attn.proj.", ".attn.to_out.0.")
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", np.split(value, 3), strict=True):
                result[name.replace(".qkv.", f".to_{part}.")] = np.ascontiguousarray(rows)
        else:
            result[name] = value
    return result


def write_folder(folder: Any, params: Mapping[str, Any], geometry: Geometry, *, facts: Mapping[str, Any] | None = None) -> None:
    """A folder that Diffusers' `JiTPipeline.from_pretrained` loads: model_index.json, scheduler/, transformer/.

    Args:
      folder: new or empty.
      params: one set of weights, of a run that predicts x: the class knows no other. The caller checks.
      facts: see `Weights.facts`; class_names become id2label, and all go into the metadata of the weights.

    Raises:
      UserError: the folder holds something, or cannot be written.
    """
    folder, facts = Path(folder).expanduser(), dict(facts or {})
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to={folder} exists and is not an empty folder: name a new one")
    config = {theirs: getattr(geometry, ours) for theirs, ours in FIELDS.items()}
    # Uniform steps in t, as the official sampler takes: shift 1.
    scheduler = {"num_train_timesteps": 1000, "shift": 1.0}
    index: dict[str, Any] = {
        "_class_name": "JiTPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "JiTTransformer2DModel"],
    }
    if facts.get("class_names"):
        index["id2label"] = {str(i): name for i, name in enumerate(facts["class_names"])}
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    try:
        for name in ("transformer", "scheduler"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        _write(folder / "transformer" / "config.json", {"_class_name": "JiTTransformer2DModel", **version, **config,
                                                        "in_channels": CHANNELS, "norm_eps": NORM_EPS})  # fmt: skip
        _write(folder / "scheduler" / "scheduler_config.json",
               {"_class_name": "FlowMatchEulerDiscreteScheduler", **version, **scheduler})  # fmt: skip
        safetensors.numpy.save_file(
            to_state_dict(params, geometry),
            folder / "transformer" / "diffusion_pytorch_model.safetensors",
            {"format": "pt", "facts": json.dumps(facts)},
        )
        _write(folder / "model_index.json", index | version)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"--to={folder}: cannot be written ({error}): free space or name another") from None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
