"""Scores of language models on questions with checkable answers; no model judges another.

The files of an evaluation contain a question's id, the model's text and the correct answer. GPQA's
authors ask that its text is never published: keep its generations, which may quote it, private.
"""
