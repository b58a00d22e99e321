"""The HTTP face of the engine on Ray Serve. It imports from `pipeline`, never the other way round."""
