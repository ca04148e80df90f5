"""JiT-B/4 at 64x64 on one to eight H200 or H100 cards.

    --config configs/h200.py            pretraining without labels, 100 epochs
    --config configs/h200.py:finetune   fine-tuning with labels, 50 epochs; add --config.init_from=<pretraining workdir>

64 images per card and micro-batch, 2 micro-batches: 1024 images per optimizer step on eight cards. One token is one
4x4 patch, 256 per image. Speed: docs/speed.md; `jitjax estimate` turns it into days.

Expected: arXiv 2511.13720 reports FID 3.55 for class-conditional JiT-B/4 (x-prediction, v-loss, 200 epochs of
ImageNet at 64 px, without the later additions to the architecture); it does not publish that run's other settings.
"""

from jitjax.config import default_config


def get_config(stage: str = "pretrain"):
    if stage not in ("pretrain", "finetune"):
        raise ValueError(f"configs/h200.py:{stage} is unknown: use pretrain or finetune")
    config = default_config()
    config.model.name = "JiT-B/4"
    config.data.image_size = 64
    config.batch_size = 64
    config.optim.accumulation_steps = 2
    config.dtype = "bfloat16"
    config.epochs = 100.0
    config.checkpoint.every_epochs = 5.0
    config.preview.every_epochs = 5.0
    if stage == "finetune":
        config.model.class_conditional = True
        config.epochs = 50.0
        config.optim.warmup_epochs = 1.0
    return config
