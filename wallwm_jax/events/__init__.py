"""Events: episodes, spans, captions, windows and the canonical action. numpy only, no JAX."""
