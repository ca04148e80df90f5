"""The model card of a saved pipeline: `README.md` as the Hugging Face Hub reads it. Says what the pipeline knows, no more."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import jax

import jitjax
from jitjax import hub, settings

if TYPE_CHECKING:
    from jitjax.pipeline import Pipeline

TAGS = ("jit", "jax", "diffusion", "pixel-space")


def sampling(pipe: Pipeline) -> settings.Sampler:
    """How the run drew its previews; the defaults of a run where it is not known."""
    config = pipe.run.get("config")
    preview = settings.from_mapping(config, ignore_unknown=True).preview if config else settings.Preview()
    options = preview.sampler()
    return options if pipe.classes else dataclasses.replace(options, cfg_scale=1.0)


def model_card(pipe: Pipeline, *, name: str = "hf://OWNER/NAME", picture: str = "") -> str:
    """The card as Markdown with its YAML header.

    Args:
      name: by which the model can be loaded.
      picture: what `samples.png` beside the card shows; '': there is none.
    """
    config = pipe.run.get("config") or {}
    geometry, classes = pipe.geometry, pipe.classes
    options = sampling(pipe)
    header = {
        "library_name": "jitjax",
        "pipeline_tag": "unconditional-image-generation",
        "tags": [*TAGS, *(["class-conditional"] if classes else [])],
    }
    title = (config.get("model") or {}).get("name") or f"JiT, {geometry.depth} blocks of width {geometry.width}"
    size = geometry.image_size
    labels = json.dumps([pipe.class_names[i] if pipe.class_names else i for i in range(min(2, classes))], ensure_ascii=False)
    arguments = [labels if classes else "num=2", "seed=0", f"steps={options.steps}", f'method="{options.method}"']
    if options.cfg_scale != 1:
        arguments += [f"cfg_scale={options.cfg_scale}", f"interval={options.interval}"]
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        "---",
        "",
        f"# {title} at {size} x {size} pixels",
        "",
        'A JiT ("Just image Transformers", [arXiv 2511.13720](https://arxiv.org/abs/2511.13720)): a plain vision '
        f"transformer that generates images straight in pixel space, {'by class' if classes else 'without classes'}.",
        "",
        *([f"![{picture}]({hub.PICTURE})", "", f"*{picture}.*", ""] if picture else []),
        "```python",
        "import jitjax",
        "",
        f"pipe = jitjax.load({json.dumps(name)})  # or the path of this folder",
        f"images = pipe.sample({', '.join(arguments)})",
        f"images.shape  # (2, {size}, {size}, 3), uint8",
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {text} |" for label, text in _facts(pipe, config).items()),
        "",
        *_scores(pipe, config),
        "This card was written from the run's own record. It names neither the training images nor a licence: say what users "
        "must know about the images, and add `license:` to the header.",
    ]
    return "\n".join(lines) + "\n"


def _facts(pipe: Pipeline, config: dict) -> dict[str, str]:
    geometry, process = pipe.geometry, pipe.diffusion
    shapes = f"{geometry.depth} blocks of width {geometry.width}, {geometry.heads} heads, patches of {geometry.patch_size} px"
    sets = ["raw weights" if name == "model" else f"EMA {name}" for name in pipe.weights]
    used = "raw weights" if pipe.which == "model" else f"EMA {pipe.which}"
    facts = {
        "network": f"{shapes}; {sum(value.size for value in pipe.params.values()):,} parameters",
        "images": f"{geometry.image_size} x {geometry.image_size} pixels, {pipe.classes or 'no'} classes",
        "predicts": f"{process.prediction}, noise scale {process.noise_scale:g}",
        "weights": f"{', '.join(sets)}; {used} unless another is asked for",
    }
    seen, optim = pipe.run.get("examples"), config.get("optim")
    if pipe.step is not None:
        facts["trained for"] = f"{pipe.step:,} steps" + (f", {seen:,} images" if seen else "")
    if count := (pipe.run.get("data") or {}).get("count"):
        facts["training set"] = f"{count:,} images" + (f" ({seen / count:,.1f} epochs)" if seen else "")
    if optim and seen and pipe.step:
        batch = seen // pipe.step
        name = "Muon and AdamW" if optim.get("name") == "muon" else "AdamW"
        rate = optim["lr"] or optim["blr"] * batch / 256
        facts["optimizer"] = f"{name}, {batch:,} images a step, learning rate {rate:.3g}, {optim['schedule']} after its warm-up"
    if config.get("dtype"):
        facts["trained in"] = f"{config['dtype']} (master weights float32)"
    facts["written by"] = f"jitjax {jitjax.__version__}, jax {jax.__version__}"
    return facts


def _scores(pipe: Pipeline, config: dict) -> list[str]:
    """What the run scored at this step, and how."""
    scores, how = pipe.run.get("scores"), config.get("eval")
    if not scores or not how:
        return []
    which = how.get("which") or how.get("ema_decay") or settings.from_mapping(config, ignore_unknown=True).optim.emas[0]
    about = f"EMA {which}, {how['num_images']:,} images, {how['method']}, {how['steps']} steps, cfg_scale {how['cfg_scale']:g}"
    rows = (f"| {name.removeprefix('eval/')} | {value:.4g} |" for name, value in scores.items())
    return [f"Scores during training ({about}):", "", "| | |", "|---|---|", *rows, ""]
