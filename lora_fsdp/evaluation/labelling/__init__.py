"""Rows without answers: which of them to label next."""
