"""The measurements behind `murmur bench`. `engine.py` is one of them: our engine beside the other Whisper runtimes."""
