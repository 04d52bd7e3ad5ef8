"""Fine-tune an encoder for text classification with Adversarial Model Perturbation.

    python recipes/train_text.py                                   # MiniLM on dair-ai/emotion
    python recipes/train_text.py --dataset path/to/reviews.csv --lora 8
    accelerate launch recipes/train_text.py --epsilon 0            # the stock Trainer

Every field of TrainingArguments, AMPConfig and TextArguments is an argument; a YAML file of them
may come first.
"""

from amp_hf.text.classification import main

if __name__ == "__main__":
    main(dict(output_dir="outputs/text"), description=__doc__)
