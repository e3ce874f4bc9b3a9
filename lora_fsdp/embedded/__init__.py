"""The embedded default: a small chat model and a table of labelled tweets, both from PyPI."""
