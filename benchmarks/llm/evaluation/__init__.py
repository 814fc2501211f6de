"""Scores of language models on questions with checkable answers; no model judges another.

The files of an evaluation contain a question's id, the model's text, and the correct answer where
the data may be shared. GPQA's authors ask that its text is never published, so nothing of its
questions and choices is written. A model may quote its prompt, so keep GPQA's generations private.
"""
