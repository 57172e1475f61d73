"""A robot with the public `openpi-client` and nothing of this package: prints what it was told, as JSON."""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

robot = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
metadata = robot.get_server_metadata()
request = {
    "images": {view: np.full((64, 64, 3), 128, np.uint8) for view in metadata["views"]},
    "state": np.array([[0.4, 0.1, 0.2, 1, 0, 0, 0, 0.2]]),
    "prompt": "reach",
    **({"duration_s": 0.8} if metadata["modes"] == ["event"] else {}),
}
reply = robot.infer(request)
try:
    robot.infer({**request, "prompt": ""})
except RuntimeError as refused:
    error = str(refused)
broker = ActionChunkBroker(robot, action_horizon=8)
steps = [broker.infer({**request, "reset": True})["actions"].tolist() for _ in range(3)]
print(
    json.dumps(
        {
            "views": metadata["views"],
            "actions": reply["actions"].tolist(),
            "steps": reply["event" if "event" in reply else "chunk"]["steps"],
            "error": error,
            "broker": steps,
        }
    )
)
