"""LeRobot sets, versions 2.0 to 3: rows by pyarrow, pictures by PyAV, no torch."""
