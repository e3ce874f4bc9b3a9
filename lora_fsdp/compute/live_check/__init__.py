"""What the live check compares: examples laid together and alone, their answers and gradients."""
