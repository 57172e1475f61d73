"""Closed-loop and open-loop evaluation, and the report."""
