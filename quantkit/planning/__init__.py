"""What a run will cost and whether the target engine will take the result, known before a weight is read."""
