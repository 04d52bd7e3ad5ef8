"""Train a timm model on GTSRB (German traffic signs) with Adversarial Model Perturbation.

    python recipes/train_gtsrb.py                                  # fine-tunes timm's resnet18
    python recipes/train_gtsrb.py --from_scratch                   # a small network for signs
    accelerate launch recipes/train_gtsrb.py --epsilon 0           # the stock Trainer

Every field of TrainingArguments, AMPConfig and ImageArguments is an argument; a YAML file of them
may come first.
"""

from amp_hf.images.classification import main

if __name__ == "__main__":
    main(
        defaults=dict(dataset="tanganke/gtsrb", augment="signs", output_dir="outputs/gtsrb"),
        from_scratch_defaults=dict(
            model="preactresnet10_signs", augment="strong_signs", num_train_epochs=20
        ),
        description=__doc__,
    )
