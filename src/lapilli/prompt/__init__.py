"""Prompts: messages, templates, tokens. No torch, no files."""
