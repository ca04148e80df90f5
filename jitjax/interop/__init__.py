"""Weights in and out: official and forked PyTorch checkpoints, safetensors, Diffusers folders. Nothing here needs PyTorch."""
