"""Stages: Table 1 of the paper with our additions, and what two real steps of each move."""

import jax
import numpy as np
import pytest
from training_setup import built_step, compiled_step, device_batch, random_state, training_config

from wallwm_jax.console import UserError
from wallwm_jax.training.stages import STAGES, get_stage
from wallwm_jax.training.train_state import flatten

ALL = {"video", "action", "text", "duration"}


def test_the_table_is_that_of_the_paper_and_its_additions():
    """T trained, F frozen, - not attached.

    The paper's rows are video DiT, action DiT, T5, VLM backbone, project-out and heads (`vlm_text`), in stages 1 video,
    2 action, 3 vlm_text, 4 staircase, 5 chunk. Ours: the stages joint and vlm_sft, the duration head, the small
    language model, that the bytes text encoder trains, and that stage 4 ties latents to the towers and their text.
    The towers, frozen in the paper's stage 3, do not take part in its loss: not attached.
    """
    groups = ("video", "action", "text", "duration", "vlm", "vlm_text", "small", "staircase")
    table = {
        name: "".join("T" if group in stage.trains else "F" if group in stage.freezes else "-" for group in groups)
        for name, stage in STAGES.items()
    }
    assert table == {
        "video": "T-T-----",
        "action": "FTFT----",
        "vlm_text": "--F-FT--",
        "staircase": "FFF-F-FT",
        "joint": "TTTT----",
        "vlm_sft": "----T-T-",
        "chunk": "TTFF----",
    }
    assert {name: stage.losses for name, stage in STAGES.items()} == {
        "video": ("video",),
        "action": ("action", "duration"),
        "vlm_text": ("align", "present", "next", "time"),
        "joint": ("video", "action", "duration"),
        "chunk": ("video", "action"),
        "vlm_sft": ("answer", "small"),
        "staircase": ("trace", "match", "latent_action", "latent_video"),
    }
    assert {name: stage.video_sigma for name, stage in STAGES.items() if stage.video_sigma} == {
        "joint": "uniform",
        "video": "uniform",
        "action": "anchor",
        "chunk": "mixed",
        "staircase": "anchor",
    }


def test_an_unknown_stage_is_an_error():
    with pytest.raises(
        UserError, match=r"train.stage='vidoe' is not a stage; the stages are joint, video, action, chunk"
    ):
        get_stage("vidoe")


@pytest.mark.parametrize("stage", ["joint", "video", "action"])
def test_two_steps_move_exactly_what_the_stage_trains(clustered_store, stage):
    """Every trained array moves, every frozen bit stays, nothing else is in the state.

    E_abs is off where windows have no history (WALL-WM section 2.6, scheme A).
    """
    built, step = built_step(clustered_store, stage), compiled_step(clustered_store, stage)
    config = training_config(clustered_store, stage)
    state = random_state(config, built)
    before = jax.device_get({"trainable": flatten(state.trainable), "frozen": flatten(state.frozen)})
    for seed in range(2):
        state, metrics = step(state, device_batch(config, built, seed))
    after = jax.device_get({"trainable": flatten(state.trainable), "frozen": flatten(state.frozen)})

    row = STAGES[stage]
    assert {path.split("/")[0] for path in after["trainable"]} == set(row.trains)
    assert {path.split("/")[0] for path in after["frozen"]} == set(row.freezes)
    still = [path for path, leaf in after["trainable"].items() if np.array_equal(leaf, before["trainable"][path])]
    assert still == (["action/window_embedding"] if "action" in row.trains else [])
    for path, leaf in after["frozen"].items():
        assert leaf.dtype == "bfloat16"
        np.testing.assert_array_equal(leaf, before["frozen"][path])
    assert {name for name in metrics if name.startswith("loss_")} == {f"loss_{stream}" for stream in row.losses}
    weights = {"loss_video": 1.0, "loss_action": 1.0, "loss_duration": 0.1}
    total = sum(weights[name] * float(value) for name, value in metrics.items() if name in weights)
    assert float(metrics["loss"]) == pytest.approx(total, rel=1e-5)
