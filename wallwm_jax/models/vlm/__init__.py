"""The vision-language model: Qwen3.5's layout."""
