"""OCBench as a source of demonstrations and as the world that policies act in. Importing it loads nothing."""
