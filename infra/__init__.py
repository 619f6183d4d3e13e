"""The AWS side of the classifier, as one CDK stack. ``stack.py`` is the table of contents."""
