"""Prefect flows over the DVC pipeline. The library does the work; DVC is the only cache."""
