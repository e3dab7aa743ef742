"""What is said: messages, templates, tokens. No torch, no files."""
