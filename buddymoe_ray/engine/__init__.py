"""Generation: sequences, batching, KV cache, sampling, text. Start at `engine.Engine`; `llm.LLM` is the short way."""
