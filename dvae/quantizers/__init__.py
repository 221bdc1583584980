"""Quantizers: one file each, all returning `Quantized`, all with `forward(latents)`, `lookup(codes)` and `embedding_dim`."""
