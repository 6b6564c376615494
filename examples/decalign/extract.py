"""Features of raw text and sound, and of the files that visual tools write: `extract`."""


def main(args=None):
    raise NotImplementedError
