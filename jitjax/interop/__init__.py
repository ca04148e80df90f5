"""Weights in and out: the published PyTorch checkpoints (.pth) and safetensors. Nothing here needs PyTorch."""
