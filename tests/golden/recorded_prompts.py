"""The prompts whose embeddings are recorded."""

EMBEDDED = {"short": "a photo of a red cat on a couch", "empty": "", "long": "a blue dog near the house, " * 100}

# What the built-in model is asked: a prompt and a grid of image tokens (rows, columns).
MICRO_PROMPT = "a large blue zorb at the top left on a striped yellow background"
MICRO_GRID = (3, 5)
