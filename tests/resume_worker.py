"""A training run of test_resume.py."""

import os
import signal

from support import ConvNet, digits, learnt, make, on, outcome, trainer_for

from amp_hf import AMPConfig

# The fourth step of the twelve is the first one perturbed; the sixth where ε sets itself.
CONFIGS = {
    "steered": AMPConfig(),
    "ascents": AMPConfig(0.1, ascent_start=0.25, ascent_every=2, inner_steps=2, scope="batch"),
    "reused": AMPConfig(0.1, ascent_start=0.25, ascent_every=4, ascent_reuse=True),
    "sub_batch": AMPConfig(0.1, ascent_start=0.25, ascent_every=2, ascent_fraction=0.5),
}


def run(folder, mode, config):
    """What a run leaves behind that is whole, killed or resumed."""

    def kill(event, state, control):
        if state.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    callbacks = [on(["on_substep_end"], kill)] if mode == "killed" else []
    if config == "steered" and mode != "resumed":
        callbacks.append(learnt())
    trainer = trainer_for(
        make(ConvNet),
        folder,
        CONFIGS[config],
        data=digits()[:128],  # eight steps an epoch
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=12,
        save_strategy="steps",
        save_steps=3,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        learning_rate=1e-2,
        max_grad_norm=1.0,
        trainer={"callbacks": callbacks},
    )
    trainer.train(resume_from_checkpoint=True if mode == "resumed" else None)
    return outcome(trainer)
