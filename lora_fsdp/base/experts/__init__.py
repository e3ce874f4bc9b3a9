"""Weights of all experts of a layer in one tensor: kept packed, turned into numbers for use."""
