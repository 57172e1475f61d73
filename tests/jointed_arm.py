"""An arm with a known solution, for tests of sets that hold joints: pan, two links that pitch, a wrist that rolls."""

import numpy as np
from recorded_motion import DESCRIPTION

BASE_M, LINK_M = 0.1, 0.5
MODEL = f"""
<mujoco>
  <compiler angle="radian"/>
  <worldbody>
    <body name="turntable" pos="0 0 {BASE_M}">
      <joint name="pan" axis="0 0 1" range="-3.2 3.2" limited="true"/>
      <geom size="0.01"/>
      <body name="upper">
        <joint name="shoulder" axis="0 1 0" range="-3.2 1" limited="true"/>
        <geom size="0.01"/>
        <body name="fore" pos="{LINK_M} 0 0">
          <joint name="elbow" axis="0 1 0" range="0 3.2" limited="true"/>
          <geom size="0.01"/>
          <body name="hand" pos="{LINK_M} 0 0">
            <joint name="roll" axis="1 0 0"/>
            <geom size="0.01"/>
            <site name="tip"/>
          </body>
        </body>
      </body>
    </body>
    <body name="cup"><freejoint name="loose"/><geom size="0.01"/></body>
  </worldbody>
</mujoco>
"""
JOINTS = ("pan", "shoulder", "elbow", "roll")
JOINT_DESCRIPTION = (
    DESCRIPTION[: DESCRIPTION.index("[[arms]]")]
    + """
[[arms]]
[arms.kinematics]
model = "arm.xml"
joints = ["pan", "shoulder", "elbow", "roll"]
site = "tip"
[arms.state]
joints = "observation.state[0:4]"
joint_unit = "deg"
gripper = "observation.state[4]"
gripper_open = 0.08
gripper_closed = 0.0
[arms.action]
mode = "absolute"
joints = "action[0:4]"
gripper = "action[4]"
gripper_open = 0.08
gripper_closed = 0.0
"""
)


def solve(positions: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Joints `[N, 4]`, radians, that bring the tip to positions `[N, 3]`, metres, elbow up."""
    out, down = np.hypot(positions[:, 0], positions[:, 1]), BASE_M - positions[:, 2]
    elbow = np.arccos((out**2 + down**2) / (2 * LINK_M**2) - 1)
    shoulder = np.arctan2(down, out) - elbow / 2
    return np.column_stack([np.arctan2(positions[:, 1], positions[:, 0]), shoulder, elbow, roll])
