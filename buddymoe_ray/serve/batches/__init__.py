"""Files of requests and of answers, as OpenAI's Batch API has them: over HTTP here, and for `buddymoe batch`.

Reading order: `lines` (the input) → `journal` (what is finished) → `entries` (how a line is answered) → `output` (all
of it, in order); over HTTP `records` (the API's words) → `store` (what is kept) → `runner` → `routes`.
"""
