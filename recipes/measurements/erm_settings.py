"""The settings and rows of erm_comparison.py."""

from language_model import LanguageModelJob
from plan import CIFAR10, DIGITS, GTSRB, SECTIONS, Row, Setting
from variants import ASAM, Averaged, MixedUp

from amp_hf.text.classification import TextJob

VIT = (
    '--model_args {"patch_size":8} --optim adamw_torch_fused --learning_rate 0.001 '
    "--weight_decay 0.05 --max_grad_norm 1"
)
PLAIN, OBJECTS, SIGNS = (f"--augment {name}" for name in ("none", "objects", "signs"))
FEW, MANY = "--max_train_samples 2000", "--max_train_samples 10000"
SMALL_BATCH = "--per_device_train_batch_size 32"
LITE = "tf_efficientnet_lite0"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"

# Compared with ERM only.
LARGER = {
    # By mistake: a flip turns one sign into another.
    "gtsrb test_resnet full": Setting(
        "GTSRB, all 39,209 images, cropped and flipped, 10 epochs",
        GTSRB,
        "test_resnet",
        OBJECTS,
        10,
        epsilon=0.05,
    ),
    "cifar10 test_resnet full": Setting(
        "CIFAR-10, all 50,000 images, 20 epochs", CIFAR10, "test_resnet", PLAIN, 20, epsilon=0.2
    ),
    "gtsrb resnet18": Setting(
        "GTSRB, 2,000 images, 40 epochs", GTSRB, "resnet18", f"{FEW} {PLAIN}", 40, epsilon=0.1
    ),
}
# The schedules, long and short, that one setting should suit. It should suit FURTHER as well.
SCHEDULES = {
    "gtsrb test_resnet": Setting(
        "GTSRB, 2,000 images, 60 epochs", GTSRB, "test_resnet", f"{FEW} {PLAIN}", 60, epsilon=0.4
    ),
    "cifar10 test_resnet": Setting(
        "CIFAR-10, 2,000 images, 60 epochs",
        CIFAR10,
        "test_resnet",
        f"{FEW} {OBJECTS}",
        60,
        epsilon=0.1,
    ),
    "gtsrb test_vit": Setting(
        "GTSRB, 1,000 images, 120 epochs",
        GTSRB,
        "test_vit",
        f"{VIT} --max_train_samples 1000 {PLAIN}",
        120,
        epsilon=0.02,
    ),
    "cifar10 test_vit": Setting(
        "CIFAR-10, 2,000 images, 60 epochs",
        CIFAR10,
        "test_vit",
        f"{VIT} {FEW} {PLAIN}",
        60,
        epsilon=0.05,
    ),
    "digits test_resnet": Setting(
        "digits, 200 images, 60 epochs",
        DIGITS,
        "test_resnet",
        f"{PLAIN} {SMALL_BATCH} --max_train_samples 200",
        60,
        epsilon=0.1,
    ),
    "digits test_vit": Setting(
        "digits, 200 images, 60 epochs",
        DIGITS,
        "test_vit",
        f"{VIT} {PLAIN} {SMALL_BATCH} --max_train_samples 200",
        60,
        epsilon=0.02,
    ),
    "gtsrb test_resnet short": Setting(
        "GTSRB, 10,000 images, 5 epochs", GTSRB, "test_resnet", f"{MANY} {SIGNS}", 5
    ),
    "cifar10 test_resnet short": Setting(
        "CIFAR-10, 10,000 images, 5 epochs", CIFAR10, "test_resnet", f"{MANY} {OBJECTS}", 5
    ),
    "gtsrb test_vit short": Setting(
        "GTSRB, 10,000 images, 5 epochs", GTSRB, "test_vit", f"{VIT} {MANY} {SIGNS}", 5
    ),
    "cifar10 test_vit short": Setting(
        "CIFAR-10, 10,000 images, 5 epochs", CIFAR10, "test_vit", f"{VIT} {MANY} {OBJECTS}", 5
    ),
    "digits test_resnet short": Setting(
        "digits, 1,000 images, 3 epochs", DIGITS, "test_resnet", f"{PLAIN} {SMALL_BATCH}", 3
    ),
    "digits test_vit short": Setting(
        "digits, 1,000 images, 3 epochs", DIGITS, "test_vit", f"{VIT} {PLAIN} {SMALL_BATCH}", 3
    ),
}
FINE_TUNED = {
    "gtsrb test_resnet tuned": Setting(
        "GTSRB, 2,000 images, 20 epochs from a trained model",
        GTSRB,
        "test_resnet",
        f"{FEW} {PLAIN} --image_size 32 --learning_rate 0.01",
        20,
        base="gtsrb test_resnet short",
    ),
}
# Other networks, some of them pretrained, and texts. Their Hessian is not measured.
FURTHER = {
    "cifar10 preactresnet18": Setting(
        "CIFAR-10, 1,000 images, a quarter of the width, 40 epochs",
        CIFAR10,
        "preactresnet18",
        '--model_args {"channels":[16,32,64,128],"stem_chs":16} --max_train_samples 1000 '
        f"{PLAIN}",
        40,
        curvature=False,
        epsilon=0.4,
    ),
    "gtsrb efficientnet": Setting(
        "GTSRB, 500 images at 64 px, pretrained, 20 epochs",
        GTSRB,
        LITE,
        f"--image_size 64 --learning_rate 0.01 {SMALL_BATCH} --max_train_samples 500 "
        f"--max_eval_samples 4000 {PLAIN}",
        20,
        pretrained=True,
        curvature=False,
        epsilon=0.05,
    ),
    "cifar10 efficientnet": Setting(
        "CIFAR-10, 500 images at 64 px, pretrained, 20 epochs",
        CIFAR10,
        LITE,
        f"--image_size 64 {SMALL_BATCH} --max_train_samples 500 --max_eval_samples 4000 {OBJECTS}",
        20,
        pretrained=True,
        curvature=False,
        epsilon=0.05,
    ),
    "cifar10 efficientnet slow": Setting(
        "CIFAR-10, 500 images at 64 px, pretrained, 20 epochs, learning rate 0.002",
        CIFAR10,
        LITE,
        f"--image_size 64 --learning_rate 0.002 {SMALL_BATCH} --max_train_samples 500 "
        f"--max_eval_samples 4000 {OBJECTS}",
        20,
        pretrained=True,
        curvature=False,
        epsilon=0.02,
    ),
    "texts minilm": Setting(
        "Debian sections, 500 texts, pretrained, 12 epochs",
        SECTIONS,
        MINILM,
        "--max_train_samples 500 --max_eval_samples 1000",
        12,
        pretrained=True,
        job=TextJob,
        curvature=False,
        epsilon=0.1,
    ),
    "texts lora": Setting(
        "Debian sections, 500 texts, LoRA of rank 8, 12 epochs",
        SECTIONS,
        MINILM,
        "--max_train_samples 500 --max_eval_samples 1000 --lora 8 --learning_rate 0.001",
        12,
        pretrained=True,
        job=TextJob,
        curvature=False,
    ),
    "texts language model": Setting(
        "bytes of 500 Debian descriptions, 60 epochs",
        SECTIONS,
        "gpt2",
        "--max_train_samples 500 --max_eval_samples 500 --learning_rate 0.003",
        60,
        job=LanguageModelJob,
        curvature=False,
    ),
}
# As the recipes train from scratch by themselves. In bf16, the Hessian would be too coarse.
AS_RECIPES = {
    "gtsrb recipe": Setting(
        "GTSRB, all 39,209 images at 48 px, augmented, 24 epochs",
        GTSRB,
        "preactresnet10_signs",
        "",
        24,
        recipe=True,
        curvature=False,
        corrupted=True,
    ),
    "gtsrb recipe, 32 px": Setting(
        "GTSRB, all 39,209 images at 32 px, augmented, 24 epochs",
        GTSRB,
        "preactresnet10_signs",
        "--image_size 32",
        24,
        recipe=True,
        curvature=False,
        corrupted=True,
    ),
    "cifar10 recipe": Setting(
        "CIFAR-10, all 50,000 images, augmented, 24 epochs",
        CIFAR10,
        "convnet7_objects",
        "",
        24,
        recipe=True,
        curvature=False,
    ),
}
SETTINGS = LARGER | SCHEDULES | FINE_TUNED | FURTHER | AS_RECIPES

RESULTS = {
    "ERM": Row(epsilon=0, curvature=True),
    "AMP()": Row(curvature=True),
    "budget 1.15": Row(budget=1.15, curvature=True),
    "AMP": Row(chosen_epsilon=True, curvature=True),
    "ERM, 2 × the epochs": Row(epsilon=0, epochs=2.0, curvature=True),
}
# What should need no tuning.
DEFAULTS = ("AMP()", "budget 1.15")
ELEMENTWISE = "AMP(), elementwise"
HELD_OUT_ERM = "held out, ERM"


def held_out(epsilon: float) -> str:
    """The name of the row that perturbs every step, once, with ζ = 1."""
    return f"held out, ε {epsilon}"


# Families of the grid: ascents per step and their rate.
ONCE, TWICE, SMALLER_RATE = "N = 1, ζ = 1", "N = 2", "ζ = 0.1, 0.03"
HELD_OUT = {
    HELD_OUT_ERM: Row(epsilon=0, held_out=True),
    **{
        held_out(epsilon): Row(epsilon=epsilon, held_out=True, family=ONCE)
        for epsilon in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
    },
    **{
        f"{held_out(epsilon)}, N 2": Row("--inner_steps 2", epsilon, held_out=True, family=TWICE)
        for epsilon in (0.1, 0.4)
    },
    **{
        f"{held_out(0.2)}, ζ {rate}": Row(
            f"--inner_lr {rate}", 0.2, held_out=True, family=SMALLER_RATE
        )
        for rate in (0.03, 0.1)
    },
}
# What else a user might take, as published, and with AMP.
ALTERNATIVES = {
    "label smoothing 0.1": Row("--label_smoothing_factor 0.1", epsilon=0),
    "MixUp": Row(epsilon=0, trainer=MixedUp),
    "average of the weights": Row(epsilon=0, trainer=Averaged),
    "SAM, ρ 0.05": Row("--inner_lr 1e6", epsilon=0.05),  # always on the sphere
    "ASAM, ρ 0.5": Row(epsilon=0.5, trainer=ASAM),
    ELEMENTWISE: Row("--ball elementwise"),
    "MixUp, AMP()": Row(trainer=MixedUp),
    "average of the weights, AMP()": Row(trainer=Averaged),
}
# Half and a quarter of the default.
SMALLER_RISES = {f"AMP(), rise {rise}": Row(f"--rise {rise}") for rise in (0.1, 0.05)}
ROWS = RESULTS | ALTERNATIVES | SMALLER_RISES | HELD_OUT

# The radii that held-out images chose from, and texts.
TRIED = {
    "gtsrb test_resnet full": (0.02, 0.05, 0.1, 0.2),
    "cifar10 test_resnet full": (0.05, 0.1, 0.2, 0.4),
    "gtsrb test_resnet": (0.1, 0.2, 0.4),
    "cifar10 test_resnet": (0.1, 0.2, 0.4),
    "gtsrb resnet18": (0.05, 0.1, 0.2, 0.4),
    "gtsrb test_vit": (0.02, 0.05, 0.1),
    "cifar10 test_vit": (0.02, 0.05, 0.1),
    "digits test_resnet": (0.05, 0.1, 0.2, 0.4),
    "digits test_vit": (0.02, 0.05, 0.1, 0.2),
    "cifar10 preactresnet18": (0.05, 0.1, 0.2, 0.4, 0.8),
    "gtsrb efficientnet": (0.02, 0.05, 0.1, 0.2, 0.4),
    "cifar10 efficientnet": (0.02, 0.05, 0.1, 0.2, 0.4),
    "cifar10 efficientnet slow": (0.02, 0.05, 0.1, 0.2),
    "texts minilm": (0.05, 0.1, 0.2, 0.4),
}
COMPARED = tuple(TRIED)[:7]  # with twice the epochs, too
