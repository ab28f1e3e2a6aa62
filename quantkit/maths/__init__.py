"""Tensors in, tensors out: no files, no logging, no choice of device."""
