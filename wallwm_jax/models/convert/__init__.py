"""Public weights into our parameter tree and back: `rules` (vocabulary), one table per model, `stream` (the work)."""
