"""Server of one model: thin translations of the field's protocols onto one engine.

    request of a protocol --openai | anthropic | ollama--> ChatRequest --Service--> AsyncEngine

`lapilli serve` and `create_app` need the extra `lapilli[serve]`.
"""
