"""What goes over the wire: bodies of requests (pydantic, validated once) and objects of answers (msgspec, encoded per chunk)."""
