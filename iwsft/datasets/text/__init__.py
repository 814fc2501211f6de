"""Text as data: rows, chat templates with their masks, and token trajectories.

The public names are importable from :mod:`iwsft.language`. transformers and datasets load where
they are used.
"""
