"""The engines: loading into shards, the frozen model's host, the trained module's engine."""
