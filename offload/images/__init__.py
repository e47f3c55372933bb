"""The origins of images, one a file."""
