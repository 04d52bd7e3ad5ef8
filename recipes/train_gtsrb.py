"""Train a timm model on GTSRB (German traffic signs) with Adversarial Model Perturbation.

    python recipes/train_gtsrb.py --model resnet18                 # fine-tunes timm's weights
    python recipes/train_gtsrb.py --model resnet18 --from_scratch
    accelerate launch recipes/train_gtsrb.py --epsilon 0           # the stock Trainer

Every field of TrainingArguments, AMPConfig and ImageArguments is an argument; a YAML file of them
may come first.
"""

from amp_hf.image_classification import main

if __name__ == "__main__":
    main(
        defaults=dict(
            dataset="tanganke/gtsrb",
            augment="signs",
            output_dir="outputs/gtsrb",
            image_size=128,
            num_train_epochs=10,
            learning_rate=0.01,
            per_device_train_batch_size=128,
            per_device_eval_batch_size=256,
            optim="sgd",
            optim_args="momentum=0.9,nesterov=true",
            weight_decay=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_grad_norm=0.0,
            logging_steps=50,
            save_strategy="epoch",
            save_total_limit=2,
        ),
        from_scratch_defaults=dict(image_size=32, num_train_epochs=15, learning_rate=0.1),
        description=__doc__,
    )
