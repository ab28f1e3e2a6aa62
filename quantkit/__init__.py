"""quantkit: quantize causal language models with five methods and measure what that cost."""

__version__ = "0.1.0"
