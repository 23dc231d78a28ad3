"""Generation: sequences, batching, KV cache, sampling, text. `engine.Engine` is the centre, `llm.LLM` the offline door.
"""
