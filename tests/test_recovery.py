"""Recoveries of OCBench's experts: where they are disturbed, within which bounds, how they are told, in which split."""

import dataclasses

import numpy as np
import pytest
from synthetic import synthetic_episode

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.store_writer import StoreOptions, atomic_directory, write_store
from wallwm_jax.events.caption import Facts, Thing
from wallwm_jax.sources.opening import SourceOptions, open_source
from wallwm_jax.sources.simulator import expert, ocbench_demos, recovery
from wallwm_jax.sources.simulator.expert import Rollout, StepLabel, Subtask

BLOCK = Facts(Thing("block", "blue"), toward="to the drawer", onto="into the drawer")
BUTTON = Facts(Thing("button", "red", "on the left"), purpose="unlock the drawer")
DRAWER = Facts(Thing("drawer"), handle=Thing("drawer handle"), direction="to the left", result="open")
PLACE = ("place", BLOCK, {"task": "cube", "block": 0}, "reach descend grasp lift carry lower release retract")
PRESS = ("press", BUTTON, {"task": "button", "button": 0}, "reach press retract")
OPEN = ("open", DRAWER, {"task": "drawer"}, "reach descend grasp pull release retract")
DISK = Facts(Thing("disk", "blue", "on the left peg"), toward="to the right peg", onto="onto the right peg")
MOVE = ("place", DISK, {"disk": 0, "source": 0, "target": 2}, "reach descend grasp lift carry lower release retract")
STEPS = 5  # of every action


def rollout(*subtasks, recovers=""):
    """A rollout of these subtasks as far as labels go: every action takes `STEPS` steps."""
    labels = [
        StepLabel(number, plan=number, interval=phase, verb=verb)
        for number, (*_, verbs) in enumerate(subtasks)
        for phase, verb in enumerate(verbs.split())
        for _ in range(STEPS)
    ]
    told = [Subtask(verb, facts, True, goal) for verb, facts, goal, _ in subtasks]
    nothing = np.zeros((len(labels), 1, 4, 4))
    return Rollout(
        ("tidy up",), [], nothing, nothing[..., 0, 0], labels, told, True, lambda goal, info: True, False, recovers
    )


def test_experts_are_disturbed_where_they_touch_press_move_lower_or_let_go():
    found = recovery.contacts(rollout(PRESS, PLACE, OPEN))
    assert [(contact.verb, contact.kinds) for contact in found] == [
        ("press", ("hand",)),
        ("grasp", ("hand", "gripper", "object")),
        ("lower", ("hand", "gripper")),
        ("release", ("hand",)),
        ("grasp", ("hand", "gripper")),  # a handle is no loose object
        ("pull", ("hand", "gripper")),  # and where it is let go it is where it belongs
    ]
    grasp, pull = found[1], found[5]
    assert (grasp.earliest, grasp.step) == ((3 + 1) * STEPS + 1, (3 + 2) * STEPS)  # in the descent
    assert pull.earliest == pull.step == (3 + 8 + 3) * STEPS  # once the handle is held


def test_no_disk_is_dropped_on_its_way_because_its_caption_names_the_peg_it_was_on():
    kinds = {contact.verb: contact.kinds for contact in recovery.contacts(rollout(MOVE))}
    assert kinds == {"grasp": ("hand", "gripper"), "lower": ("hand",), "release": ("hand",)}


def test_disturbances_stay_within_their_bounds_and_follow_from_the_seed():
    found = recovery.contacts(rollout(PRESS, PLACE, OPEN))
    drawn = [recovery.draw(found, np.random.default_rng([7, turn])) for turn in range(600)]
    assert drawn == [recovery.draw(found, np.random.default_rng([7, turn])) for turn in range(600)]
    assert len(set(drawn)) == 600
    by_kind = {kind: [d for d in drawn if d.kind == kind] for kind in recovery.KINDS}
    assert all(150 < len(group) < 250 for group in by_kind.values())
    for disturbance in drawn:
        assert any(
            contact.earliest <= disturbance.step <= contact.step and disturbance.kind in contact.kinds
            for contact in found
            if contact.verb == disturbance.contact
        )
    lengths = {kind: [np.linalg.norm(d.shift) for d in group] for kind, group in by_kind.items()}
    assert min(lengths["hand"]) >= 0.02 and 0.055 < max(lengths["hand"]) <= 0.06
    assert min(lengths["object"]) >= 0.02 and 0.045 < max(lengths["object"]) <= 0.05
    assert max(lengths["gripper"]) == 0.0
    assert all(d.shift[2] >= 0.0 and abs(d.yaw) <= 0.35 for d in by_kind["hand"])  # never into the table
    assert {(d.step, d.shift[2], d.yaw) for d in by_kind["object"]} == {(4 * STEPS + 1, 0.0, 0.0)}  # the hand is above


@pytest.mark.parametrize(
    ("kind", "contact", "resumes", "recovers"),
    [
        ("hand", "press", False, "press"),
        ("hand", "grasp", False, "grasp"),
        ("hand", "lower", True, "lower"),  # it still holds the block: back, and down
        ("hand", "release", True, "release"),
        ("gripper", "lower", False, "grasp"),  # it has dropped it
        ("hand", "pull", False, "grasp"),  # the expert lets go of a handle to plan anew
    ],
)
def test_what_sets_it_right_depends_on_what_is_still_in_the_hand(kind, contact, resumes, recovers):
    disturbance = recovery.Disturbance(kind, contact, 10, 0)
    assert (disturbance.resumes, disturbance.recovers) == (resumes, recovers)


def test_a_recovery_is_told_by_its_segments_while_actions_and_subtasks_read_as_ever():
    nominal, recovered = (expert.spans(rollout(PLACE, recovers=verb)) for verb in ("", "grasp"))
    for level in ("task", "subtask", "action"):
        assert nominal[level] == recovered[level]
    first = recovered["segment"][:4]
    assert [span.verb for span in first] == ["recover", "recover", "recover", "lift"]
    assert {(span.caption, span.paraphrases[0]) for span in first[:3]} == {
        ("move back and grasp the blue block", "go back into place and grasp the blue block")
    }
    pressed = expert.spans(rollout(PRESS, recovers="press"))["segment"]
    assert pressed[0].caption == "move back and press the red button on the left"
    assert [span.verb for span in pressed] == ["recover", "recover", "retract"]


def test_a_recovery_without_a_grasp_of_its_own_ends_where_the_hand_moves_on():
    verbs = "reach descend pull release retract"
    segments = expert.spans(rollout((*OPEN[:3], verbs), recovers="grasp"))["segment"]
    assert [span.verb for span in segments] == ["recover", "recover", "pull", "release", "retract"]


def test_recoveries_are_in_the_split_of_their_demonstration_and_a_source_of_their_own(tmp_path):
    def episodes():
        for number in range(8):
            shown = synthetic_episode(number, steps=32)
            shown = dataclasses.replace(shown, episode_id=f"env/0/{number}", source="ocbench/env")
            yield shown
            for turn in range(number % 3):
                name = f"{shown.episode_id}/recovery-{turn}"
                yield dataclasses.replace(
                    shown, episode_id=name, source="ocbench-recovery/env", derived_from=shown.episode_id
                )

    with atomic_directory(tmp_path / "store", overwrite=False) as directory:
        write_store(directory, episodes(), StoreOptions(kinds=("event",), heldout_fraction=0.25, latent_sample=4))
    stores = {split: open_store(tmp_path / "store", split=split) for split in ("train", "heldout")}
    entries = stores["train"].episodes
    split_of = {entry["name"]: entry["split"] for entry in entries}
    derived = [entry for entry in entries if entry["derived_from"]]
    assert len(derived) == 7 and {entry["split"] for entry in derived} == {"train", "heldout"}
    assert all(entry["split"] == split_of[entry["derived_from"]] for entry in derived)
    assert sum(entry["split"] == "heldout" for entry in entries if not entry["derived_from"]) == 2
    for store in stores.values():  # the index tells recovery windows by their source
        sources = np.array(store.meta["sources"])[store.index["source"]]
        assert [source.startswith(ocbench_demos.RECOVERY_SOURCE) for source in sources] == [
            bool(entries[episode]["derived_from"]) for episode in store.index["episode"]
        ]
    assert ocbench_demos.recorded_environments(stores["train"].meta["sources"]) == ["env"]


def test_only_ocbench_has_recoveries():
    with pytest.raises(UserError, match=r"--recoveries needs .* not metaworld"):
        open_source("metaworld:button-press-v3", SourceOptions(recoveries=2))


@pytest.mark.extended
@pytest.mark.parametrize("env_id", ["chamber-cpu-lite-easy-task2-v0", "block-cpu-lite-double-task1-v0"])
def test_recoveries_start_near_the_contact_and_succeed_again_through_the_canonical_actions(env_id):
    pytest.importorskip("ocbench")
    from wallwm_jax.sources.simulator.ocbench_env import act_again

    view, job = "front_pixels", (env_id.split("-")[0], env_id, 0)
    settings = dict(seed=0, size=32, views=(view,))
    attempt, again = (ocbench_demos.record_attempt(job, recoveries=tries, **settings) for tries in (4, 2))
    assert sum(tried.outcome == "kept" for tried in attempt.recoveries) >= 2
    for one, other in zip(attempt.recoveries, again.recoveries):
        assert (one.kind, one.outcome) == (other.kind, other.outcome)
        if one.episode is not None:
            assert one.episode.frames == other.episode.frames and one.episode.spans == other.episode.spans
            assert np.array_equal(one.episode.command_poses, other.episode.command_poses)
    env, make_controller = ocbench_demos._environment(env_id, 32, (view,)), ocbench_demos.controller_factory(env_id)
    seed = attempt.episode.seed
    nominal = expert.roll_out(env, make_controller, seed, 2)
    contacts = recovery.contacts(nominal)
    for turn, tried in enumerate(attempt.recoveries):
        episode = tried.episode
        if episode is None:
            continue
        disturbance = recovery.draw(contacts, np.random.default_rng([seed, turn]))
        assert (episode.derived_from, episode.source) == (f"{env_id}/0/0", f"ocbench-recovery/{env_id}")
        assert f"from step {disturbance.step} on: " in episode.provenance[0] and episode.seed is None
        away = episode.poses[0, 0, :3, 3] - nominal.observations[disturbance.step].pose[0, :3, 3]
        assert np.linalg.norm(away) < recovery.HAND_M[1] + 0.02
        assert episode.spans["segment"][0].verb == "recover" and episode.num_steps % 2 == 0
        (subtask,) = episode.spans["subtask"]
        goal = nominal.subtasks[nominal.labels[disturbance.step].subtask].goal
        env.reset(seed, render=False)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (OCBench's experts draw from numpy's global generator)
        controller = make_controller(env.env)
        controller.reset(None, env.info, transition_idx=0)
        recovery.disturb_expert(env, controller, nominal, disturbance)
        assert np.allclose(env.observe(render=False).pose, episode.poses[0], atol=1e-9)
        assert not nominal.achieved(goal, env.info)
        assert (act_again(env, episode) or nominal.achieved(goal, env.info)) and subtask.success


def test_a_block_that_fell_or_was_thrown_is_no_recovery():
    assert recovery.slid(np.array([0.05, 0.0, 0.001])) and recovery.slid(np.array([-0.02, 0.02, -0.004]))
    assert not recovery.slid(np.array([0.08, 0.0, 0.0]))  # thrown
    assert not recovery.slid(np.array([0.03, 0.0, -0.04])) and not recovery.slid(np.array([0.0, 0.03, 0.03]))
