"""The HTTP server: OpenAI's Files, Batches and single calls over the job code, and a page."""
