"""The service: OpenAI's API over HTTP in front of worker replicas, as one Ray Serve application.

Reading order, along a token: `app` (what is deployed) → `http` (routes) → `wire` (requests) → `handles` (to a worker) →
`worker` (prompts, engine, batches) → `render` and `replies` (what the client sees). `records` are the words between.
"""
