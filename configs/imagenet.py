"""The published ImageNet recipes: `--config configs/imagenet.py:b16`, and b32, l16, l32, h16, h32, g16, g32.

/16 is 256x256, /32 is 512x512; 1024 images per optimizer step (128 on each of eight cards), 600 epochs (g: the paper stops at
about 320), blr 5e-5, 5 epochs of warm-up, Heun with 50 steps, guidance inside (0.1, 1.0).

Expected FID-50K at the best guidance and EMA, after 200 / 600 epochs (arXiv 2511.13720, Tables 7 and 8):
    b16 4.37 / 3.66   l16 2.79 / 2.36   h16 2.29 / 1.86   g16 2.15 / 1.82
    b32 4.64 / 4.02   l32 3.06 / 2.53   h32 2.51 / 1.94   g32 2.11 / 1.78
"""

from jitjax.config import default_config

# guidance scale at 16 (256 px) and 32 (512 px), dropout of projections
RECIPES = {"b": (3.0, 3.0, 0.0), "l": (2.4, 2.5, 0.0), "h": (2.2, 2.3, 0.2), "g": (2.2, 2.2, 0.2)}


def get_config(variant: str = "b16"):
    size, patch = variant[:1], variant[1:]
    if size not in RECIPES or patch not in ("16", "32"):
        raise ValueError(f"configs/imagenet.py:{variant} is unknown: use b16, b32, l16, l32, h16, h32, g16 or g32")
    guidance_16, guidance_32, dropout = RECIPES[size]
    config = default_config()
    config.model.name = f"JiT-{size.upper()}/{patch}"
    config.model.class_conditional = True
    config.model.num_classes = 1000
    config.model.proj_dropout = dropout
    config.data.image_size = 256 if patch == "16" else 512
    config.data.num_workers = 12
    config.diffusion.noise_scale = 1.0 if patch == "16" else 2.0
    config.batch_size = 128
    config.epochs = 320.0 if size == "g" else 600.0
    config.checkpoint.every_epochs = 5.0
    config.checkpoint.keep_every = 125_100  # every 100 epochs
    config.preview.every_epochs = 10.0
    config.preview.cfg_scale = guidance_16 if patch == "16" else guidance_32
    if size == "g":
        config.remat = "dots"
    return config
