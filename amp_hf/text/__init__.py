"""Text classification: what is its own of the recipes' job."""
