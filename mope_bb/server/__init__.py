"""`mope-bb serve`: a session as an OpenAI-compatible endpoint, and the page that uses it. See docs/server.md."""
