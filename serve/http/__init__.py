"""The OpenAI-compatible HTTP side of the server: requests in, works to the engine, answers out.

`make_app(engine, model, settings, metrics)` is the door; nothing here imports JAX.
"""
