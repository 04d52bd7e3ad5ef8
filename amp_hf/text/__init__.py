"""Text classification: the parts of the recipes' job that are specific to text."""
