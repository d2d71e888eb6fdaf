"""qdepth_jax: training stack for depth-aware vision-language-action policies."""

__version__ = "0.1.0"
