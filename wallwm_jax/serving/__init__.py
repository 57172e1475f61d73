"""Serving: one policy behind a websocket, in the protocol of the public `openpi-client`."""
