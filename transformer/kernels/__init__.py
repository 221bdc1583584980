"""Sparse attention for the masks of DALL-E: Triton kernels, their plain reference, and the operators that call them."""
