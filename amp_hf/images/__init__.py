"""Image classification: timm backbones, image datasets, and what is theirs of the recipes' job."""
