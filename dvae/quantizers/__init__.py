"""Quantizers: one file each; all have `forward(latents) -> Quantized`, `lookup(codes)` and `embedding_dim`."""
