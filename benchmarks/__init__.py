"""Side by side with the peers: ratios measured in one run, never asserted by a test."""
