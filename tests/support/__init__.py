"""What many tests need: small networks on real digits, trainers over them, comparisons."""

from .comparing import comparable, differing, logged, logs, outcome, rng_states, same, weights
from .data import Recorder, digit_batches, digits, padded, strokes
from .following import amp_gradient, assert_at, average, mean, mean_loss, mlp_loss
from .models import (
    MLP,
    THETA,
    ConvNet,
    Odd,
    PartlyUsed,
    Quadratic,
    Sharing,
    language_model,
    make,
    quadratic,
    quadratic_surface,
)
from .running import (
    ADAMW,
    BALLS,
    SCOPES,
    LiveBytes,
    always,
    arguments,
    learnt,
    needs_schedule_free,
    on,
    raise_at,
    recorded,
    spoil,
    train,
    train_language_model,
    trainer_for,
)
