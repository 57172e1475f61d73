"""Forward kinematics: where the end effector of a robot model is at given joint positions, through MuJoCo."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wallwm_jax.console import UserError


@dataclass(frozen=True)
class Kinematics:
    """An arm of a robot model; it travels to worker processes, so the loaded model is not in it.

    Attributes:
      model: path of an MJCF or URDF file.
      joints: names of its hinges and slides, in the order of the data's columns; others stay as the model has them.
      site, body: name of the end effector; the other one is "".
      base: body in whose frame poses are told; "" is the model's world.
    """

    model: str
    joints: tuple[str, ...]
    site: str = ""
    body: str = ""
    base: str = ""

    def check(self) -> None:
        """Raises `UserError` where MuJoCo or the model is not there, or the model has not what is named."""
        _load(self)

    def poses(self, joints: np.ndarray) -> np.ndarray:
        """`[N, 4, 4]` of the end effector in the frame of `base`, metres, from `[N, J]` radians or metres."""
        import mujoco

        model, addresses, _ = _load(self)
        data = mujoco.MjData(model)
        place = data.site(self.site) if self.site else data.body(self.body)
        base = data.body(self.base or "world")
        poses = np.tile(np.eye(4), (len(joints), 1, 1))
        for pose, row in zip(poses, joints):
            data.qpos[addresses] = row
            mujoco.mj_kinematics(model, data)
            turn = base.xmat.reshape(3, 3).T
            pose[:3, :3], pose[:3, 3] = turn @ place.xmat.reshape(3, 3), turn @ (place.xpos - base.xpos)
        return poses

    def limits(self) -> np.ndarray:
        """`[J, 2]` lowest and highest position of each joint by the model, infinite where it has no limit."""
        return _load(self)[2]


@functools.lru_cache(maxsize=8)
def _load(arm: Kinematics) -> tuple[Any, np.ndarray, np.ndarray]:
    """The model, the places of the joints among its positions, and their limits."""
    try:
        import mujoco
    except ImportError as error:
        raise UserError(f"poses from joints need MuJoCo ({error}): pip install 'wallwm_jax[sim]'") from None

    if not Path(arm.model).is_file():
        raise UserError(f"there is no robot model {arm.model!r}; its path is taken from the folder of the description")
    try:
        spec = mujoco.MjSpec.from_file(arm.model)
        spec.compiler.fusestatic = 0  # of a URDF, links behind fixed joints, such as tool0, would lose their names
        model = spec.compile()
    except ValueError as error:
        raise UserError(f"MuJoCo cannot read {arm.model!r}: {' '.join(str(error).split())}") from None
    names = {kind: [getattr(model, kind)(n).name for n in range(getattr(model, f"n{count}"))]
             for kind, count in (("joint", "jnt"), ("site", "site"), ("body", "body"))}  # fmt: skip
    wanted = [("joint", name) for name in arm.joints] + [("site", arm.site)] * bool(arm.site)
    for kind, name in wanted + [("body", name) for name in (arm.body, arm.base) if name]:
        if name not in names[kind]:
            known = ", ".join(filter(None, names[kind])) or "none"
            raise UserError(f"{arm.model!r} has no {kind} {name!r}; it has {known}")
    numbers = [names["joint"].index(name) for name in arm.joints]
    single = (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE)
    for name, number in zip(arm.joints, numbers):
        if model.jnt_type[number] not in single:
            raise UserError(f"joint {name!r} of {arm.model!r} is no hinge and no slide, so one number cannot place it")
    limited = model.jnt_limited[numbers].astype(bool)[:, None]
    limits = np.where(limited, model.jnt_range[numbers], [[-np.inf, np.inf]])
    return model, model.jnt_qposadr[numbers], limits
