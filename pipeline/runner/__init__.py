"""Takes claimed tracks from the queue through the stages and engines to the outbox."""
