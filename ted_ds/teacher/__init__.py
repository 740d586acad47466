"""The frozen side: what a teacher must offer, who hosts it, the collector that it streams past, its record on disk."""
