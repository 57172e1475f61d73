"""The video tower's public twin in a train step: diffusers' Wan transformer, torch.compile, AdamW, the same events.

Runs as a process of its own, so that PyTorch and JAX never share a device's memory; needs the extra `parity`, and a
PyTorch that knows the device. One event is one sample of the twin: its attention never sees another event, either.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from ml_collections import ConfigDict

from wallwm_jax.console import UserError
from wallwm_jax.models.model_flops import RowShape


def sizes(config: ConfigDict) -> dict[str, Any]:
    """What the twin has to be, and the shapes of its samples: the events that fill the rows of `config`.

    Raises:
      UserError: the twin knows no such tower: more than one view, cross-view attention, or another stage than "video".
    """
    model = config.model
    if config.train.stage != "video" or len(config.data.views) != 1 or model.view_attention:
        raise UserError(
            "--peer knows stage video, one view and no cross-view attention: add --views=1 and "
            "--config.model.view_attention=False to a config of stage video"
        )
    row = RowShape.of(config, 1)
    samples = config.data.rows * row.events
    return {
        "model": {
            "patch_size": [1, *model.patch],
            "num_attention_heads": model.heads,
            "attention_head_dim": model.width // model.heads,
            "in_channels": model.latent_channels,
            "out_channels": model.latent_channels,
            "text_dim": model.text.width,
            "freq_dim": model.freq_dim,
            "ffn_dim": model.ffn,
            "num_layers": model.depth,
        },
        "latents": [samples, model.latent_channels, row.latents // row.events, *model.latent_shape],
        "text": [samples, model.text.pad_to or row.text, model.text.width],
        "bfloat16": model.compute_dtype == "bfloat16",
        "remat": model.remat != "none",
    }


def run(config: ConfigDict, steps: int, warm_up: int) -> dict[str, Any]:
    """Seconds of each step after the warm-up (which compiles), the library versions and the twin's parameters.

    Raises:
      UserError: see `sizes`; or PyTorch or diffusers is not installed, or failed.
    """
    asked = {**sizes(config), "steps": steps, "warm_up": warm_up}
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(asked)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"--peer failed: {reason}; it needs pip install 'wallwm_jax[parity]', or leave --peer out")
    return json.loads(done.stdout.splitlines()[-1])


def _train(asked: dict[str, Any]) -> dict[str, Any]:
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model: Any = diffusers.WanTransformer3DModel(**asked["model"])
    model = model.to(device).train()
    if asked["remat"]:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    compiled = torch.compile(model) if device == "cuda" else model
    latents, target = (torch.randn(asked["latents"], device=device) for _ in range(2))
    text = torch.randn(asked["text"], device=device)
    sigma = torch.rand(len(latents), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=asked["bfloat16"]):
            velocity = compiled(latents, 1000 * sigma, text, return_dict=False)[0]
        torch.nn.functional.mse_loss(velocity.float(), target).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(asked["warm_up"] + asked["steps"]):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return {
        "what": f"diffusers {diffusers.__version__}, torch {torch.__version__}"
        + (", compiled" if device == "cuda" else ", eager"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds[asked["warm_up"] :],
    }


if __name__ == "__main__":
    print(json.dumps(_train(json.loads(sys.argv[1]))))
