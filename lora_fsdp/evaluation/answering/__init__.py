"""Rows without an answer: made examples of, asked, and their answers laid out as columns."""
