"""Image classification: timm backbones, image datasets, and the job that the recipes run."""
