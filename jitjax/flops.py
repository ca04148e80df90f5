"""The model's own operation count and size, from shapes alone. Imports no jax."""

from __future__ import annotations

from typing import Any

TIME_FEATURES = 256  # inputs of the time embedder
ADALN_VECTORS = 6  # shift, scale and gate, for attention and SwiGLU
CHANNELS = 3

IMAGENET_IMAGES = 1_281_167  # of the training set


def forward_macs(geometry: Any) -> int:
    """Multiply-adds of all matmuls in one forward pass of one image.

    With W width, F SwiGLU hidden width, V values of a patch (patch^2 * 3), K bottleneck, T image tokens, and S the
    tokens that a block sees (T, and T + context_length from block context_start on):

        patches   T (V K + K W)
        time      256 W + W W
        a block   S (3 W W + W W + 2 W F + F W)     qkv, projection, SwiGLU in and out
                  + 2 S S W                         scores, and the weighted sum of the values
                  + 6 W W                           adaLN
                    (in the last block only the T image tokens are queries and continue; all S are keys and values)
        last      T W V + 2 W W

    Norms, RoPE, softmax and other elementwise work are left out, as in the published figures (arXiv 2511.13720 calls
    these multiply-adds "Gflops": JiT-B/16 25, L/16 88, H/16 182).

    Args:
      geometry: a `jitjax.geometry.Geometry`.
    """
    g, w, f = geometry, geometry.width, geometry.mlp_hidden
    tokens, values = (g.image_size // g.patch_size) ** 2, g.patch_size**2 * CHANNELS
    macs = tokens * (values * g.bottleneck + g.bottleneck * w) + TIME_FEATURES * w + w * w
    for block in range(g.depth):
        seen = tokens + (g.context_length if block >= g.context_start else 0)
        queries = tokens if block == g.depth - 1 else seen
        macs += seen * 3 * w * w + 2 * queries * seen * w + queries * (w * w + 3 * w * f) + ADALN_VECTORS * w * w
    return macs + tokens * w * values + 2 * w * w


def train_flops(geometry: Any) -> int:
    """Operations to train on one image: 6 x `forward_macs`.

    A multiply-add is two operations; the backward pass has two matmuls for each of the forward pass. Recomputation
    (rematerialisation, attention's backward) does not count: utilisation is about useful work.
    """
    return 6 * forward_macs(geometry)


def parameters(geometry: Any) -> int:
    """Parameters of a model, of which the class embedding has (num_classes + 1) x width."""
    g, w, f = geometry, geometry.width, geometry.mlp_hidden
    values = g.patch_size**2 * CHANNELS
    embed = values * g.bottleneck + (g.bottleneck + 1) * w + (TIME_FEATURES + 1 + w + 1) * w
    labels = (g.num_classes + 1 + g.context_length) * w
    attention = (w + 1) * 3 * w + 2 * g.head_dim + (w + 1) * w
    block = 2 * w + attention + (w + 1) * 2 * f + (f + 1) * w + (w + 1) * ADALN_VECTORS * w
    return embed + labels + g.depth * block + w + (w + 1) * 2 * w + (w + 1) * values


def state_bytes(geometry: Any, optim: Any) -> int:
    """Bytes of a run's state over all devices, copies not counted: parameters, EMAs, and AdamW's two moments or Muon's one
    momentum, all float32.

    Args:
      optim: a `jitjax.settings.Optimizer`.
    """
    w, f = geometry.width, geometry.mlp_hidden
    sets = 3 + len(optim.ema_decays) + len(optim.power_emas)
    of_muon = 0
    if optim.name == "muon":
        of_muon = geometry.depth * (4 * w * w + 3 * w * f + (ADALN_VECTORS * w * w if optim.muon_adaln else 0))
    return 4 * (parameters(geometry) * sets - of_muon)
