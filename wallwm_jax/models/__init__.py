"""The networks, as pure functions over plain parameter dicts."""
