"""From logits to text: sampling, beams, stopping, streaming."""
