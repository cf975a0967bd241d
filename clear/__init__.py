"""CLEAR: unified multimodal models that restore a degraded image when they need to, then answer.

An open reproduction of arXiv 2604.04780 as a versioned pipeline. The library knows nothing of DVC or
Prefect; `clear.stages` is the thin layer that DVC runs and `flows` the one that Prefect runs.
"""

__version__ = "0.1.0"
