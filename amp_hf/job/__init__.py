"""The job that the recipes run, whatever the data: parse, build, train, evaluate, measure, push.

`amp_hf.images` and `amp_hf.text` say what is particular to theirs.
"""
