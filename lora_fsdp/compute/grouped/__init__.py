"""One pass of the base for several adapters whose parts have one size: products in batches."""
