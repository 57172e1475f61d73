"""From the event store to packed batches on devices."""
