"""The HTTP server: OpenAI's API over one engine that decodes all requests together."""
