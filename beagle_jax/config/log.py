"""Section `log`: what is printed and written during training."""

from beagle_jax.config.section import Section, setting


class LogConfig(Section):
    """What is printed and written while training."""

    every: int = setting(10, "steps between two lines of the log", ge=1)
    eval_rows: int = setting(
        0,
        "chats kept out of training, on which agreement with the target is measured; 0: none",
        affects=("stage",),
        ge=0,
    )
    profile: int = setting(
        0,
        "steps of each stage whose trace jax.profiler writes to <train.folder>/profile; 0: none",
        ge=0,
    )
    tensorboard: bool = setting(
        False, "also write metrics to <train.folder>/tensorboard; needs tensorboardX"
    )
    wandb: str | None = setting(
        None, "also send metrics to this project of Weights & Biases; needs wandb"
    )
