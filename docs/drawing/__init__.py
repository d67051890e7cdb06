"""The pictures of the documentation: what the library says, drawn as SVG."""
