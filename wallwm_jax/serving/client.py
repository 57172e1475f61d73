"""A robot's end of the wire where `openpi-client` is not installed: the same protocol on this package's numpy.

robot = Client("127.0.0.1", 8000)
print(robot.metadata)
reply = robot.infer({"images": {...}, "state": state, "prompt": "press the red button"})
"""

from __future__ import annotations

from typing import Any

from websockets.sync.client import connect

from wallwm_jax.serving.wire import packb, unpackb


class Client:
    """One connection; `metadata` is what the server says of itself."""

    def __init__(self, host: str, port: int) -> None:
        """Waits until the server is warm. Raises OSError: nobody listens there."""
        self.socket = connect(f"ws://{host}:{port}", compression=None, max_size=None)
        self.metadata: dict[str, Any] = unpackb(self.socket.recv(decode=False))

    def infer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply. Raises RuntimeError with the server's message where it refuses."""
        self.socket.send(packb(message))
        reply = self.socket.recv()
        if isinstance(reply, str):
            raise RuntimeError(reply)
        return unpackb(bytes(reply))

    def close(self) -> None:
        """Says goodbye."""
        self.socket.close()
