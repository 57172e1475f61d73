r"""The longer recipe: the quickstart's model with finer patches and three times the demonstrations, two CPU cores.

    source launch/environment.sh
    python -m wallwm_jax.build_events --source=ocbench:chamber,switch,block --episodes=144 --out=runs/cpu/store
    python -m wallwm_jax.train --config=configs/ocbench_cpu.py --config.data.store=runs/cpu/store \
        --workdir=runs/cpu/train
    python -m wallwm_jax.evaluate --workdir=runs/cpu/train --store=runs/cpu/store --level=action --episodes=24 \
        --max_seconds=1200 --out=runs/cpu/evaluation
"""

from ml_collections import ConfigDict

from configs import ocbench_quickstart


def get_config() -> ConfigDict:
    """The quickstart with 2 x 2 patches and more steps."""
    config = ocbench_quickstart.get_config()
    config.unlock()
    config.model.patch = (2, 2)
    config.optim.warmup_steps = 100
    config.train.steps = 5000
    config.train.ema_decay = 0.998
    config.train.save_every = 500
    config.train.log_every = 50
    return config.lock()
