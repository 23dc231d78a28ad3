"""Decode kernels for GPUs in Triton: an expert of every access is found by its address in a table, no host asked.

`experts` launches them and is what others import; `programs`, and `products` below it, import triton when first used.
"""
