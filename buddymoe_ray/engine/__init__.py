"""Generation: sequences, batching, KV cache, sampling and text. `engine.Engine` is the centre; `llm.LLM` works offline."""
