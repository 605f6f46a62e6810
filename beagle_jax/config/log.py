"""Section `log`: what is printed and written during training."""

from beagle_jax.config.section import Section, setting


class LogConfig(Section):
    """What is printed and written while training."""

    every: int = setting(10, "steps between two lines of the log", ge=1)
    eval_rows: int = setting(
        0,
        "chats kept out of training to measure agreement on; 0: none",
        affects=("stage",),
        ge=0,
    )
    tensorboard: bool = setting(
        False, "figures to <train.folder>/tensorboard too; needs tensorboardX"
    )
    wandb: str | None = setting(None, "project of Weights & Biases that gets them too; needs wandb")
