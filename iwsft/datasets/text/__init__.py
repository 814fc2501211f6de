"""Text as data: rows, chat templates with their masks, and trajectories of tokens.

The public names can also be imported from :mod:`iwsft.language`. transformers and datasets load
where they are used.
"""
