"""Adversarial Model Perturbation (CVPR 2021) for the Hugging Face Trainer."""

from typing import TYPE_CHECKING, Any

from .config import AMPConfig

if TYPE_CHECKING:
    from .trainer import AMPTrainer, AMPTrainerMixin

__all__ = ["AMPConfig", "AMPTrainer", "AMPTrainerMixin"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports transformers only for those who train: the mathematics and the config need none."""
    if name in ("AMPTrainer", "AMPTrainerMixin"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
