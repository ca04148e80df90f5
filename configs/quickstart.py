"""The whole of it, small: eight classes of drawn shapes at 32 px, class-conditional, minutes on a laptop's CPU.

    python -m jitjax.main --config configs/quickstart.py --workdir runs/quickstart

Expected: loss about 0.045 at the end; every class recognisable in samples/ from step 1000 on. JAX_NUM_CPU_DEVICES=8 in the
environment runs it on eight emulated devices (then add --config.batch_size=4 for the same effective batch).
"""

from jitjax.config import default_config


def get_config():
    config = default_config()
    config.data.synthetic = "shapes"
    config.data.image_size = 32
    config.data.num_workers = 0
    config.data.flip = False
    config.model.name = "JiT-nano/4"
    config.model.class_conditional = True
    config.batch_size = 32
    config.total_steps = 1500
    config.dtype = "float32"
    config.optim.lr = 1e-3
    config.optim.warmup_steps = 50
    config.optim.warmup_epochs = 0.0
    config.optim.ema_decays = (0.99, 0.9)
    config.checkpoint.every_steps = 250
    config.preview.every_steps = 250
    config.preview.cfg_scale = 2.0
    config.preview.steps = 20
    config.log.every_steps = 25
    return config
