"""What a run will need and cost, before money is spent."""
